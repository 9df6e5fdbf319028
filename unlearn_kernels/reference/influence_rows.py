"""Rows as a store keeps them, in plain formulas."""

from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.reference.influence import philox4x32

LEVELS: Final = {8: 127, 4: 7}  # of codes of so many bits, on either side of zero
_FLOATS: Final = {32: torch.float32, 16: torch.bfloat16}
_ROUNDING: Final = 6  # the last word of the counter
_NUMBERS_A_CALL: Final = 8
_LOW: Final = 0xFFFFFFFF


def noise(rows: Tensor, width: int, seed: int) -> Tensor:
    """Return a random integer of 16 bits for each row (a vector of row numbers) and each of `width` columns.

    Philox counter (row mod 2^32, col // 8 mod 2^32, col // 8 / 2^32, 6); word col % 8 // 2, its low half for even
    columns.
    """
    calls = torch.arange(-(-width // _NUMBERS_A_CALL), device=rows.device)
    row, call = torch.broadcast_tensors((rows & _LOW)[:, None], calls)
    words = torch.stack(
        philox4x32((row, call & _LOW, call >> 32, torch.full_like(row, _ROUNDING)), seed), dim=-1
    )
    return torch.stack((words & 0xFFFF, words >> 16), dim=-1).flatten(1)[:, :width]


def encode_rows(
    x: Tensor, bits: int, block: int, unbiased: bool, seed: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows (n, D) in floats of 32 or 16 bits or integers of 8 or 4, scales of blocks, squared norms.

    An integer is `floor(x / s + levels + 1 + u)`, s the greatest magnitude of its block over `levels` (127 or 7), u one
    half or, `unbiased`, `noise / 2^16` of rows first, first + 1, ...; two integers of 4 bits share a byte, the even
    column in its lower half. The scale is NaN for a block that is not finite, whose integers are those of zero, and 0
    for one with a subnormal quotient. bits 0: rows (n, 0).
    """
    sqnorms = x.double().square().sum(1)
    if bits not in LEVELS:
        rows = x.float().to(_FLOATS[bits]).contiguous() if bits else x.new_zeros(len(x), 0, dtype=torch.uint8)
        return rows, x.new_zeros(len(x), 0, dtype=torch.float32), sqnorms
    numbers = torch.arange(first, first + len(x), device=x.device)
    shift = noise(numbers, x.shape[1], seed) * 2.0**-16 if unbiased else x.new_full((1, 1), 0.5)
    codes, scales = _coded(x.float(), LEVELS[bits], block, shift.float())
    return _pairs(codes) if bits == 4 else codes, scales, sqnorms


def _coded(x: Tensor, levels: int, block: int, shift: Tensor) -> tuple[Tensor, Tensor]:
    count = -(-x.shape[1] // block)
    blocks = torch.nn.functional.pad(x, (0, count * block - x.shape[1])).unflatten(1, (count, block))
    scales = blocks.abs().amax(2) / levels
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 0.0, scales)
    scales = torch.where(blocks.isfinite().all(2), scales, torch.nan)
    usable = (scales > 0).repeat_interleave(block, dim=1)[:, : x.shape[1]]
    inverse = (1 / scales).repeat_interleave(block, dim=1)[:, : x.shape[1]]
    codes = torch.where(usable, x * inverse, 0.0) + (levels + 1 + shift)
    return codes.to(torch.int32).clamp(1, 2 * levels + 1).to(torch.uint8), scales


def _pairs(codes: Tensor) -> Tensor:
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2), value=LEVELS[4] + 1)
    return even[:, ::2] | even[:, 1::2] << 4

"""Rows as they lie in a store: floats as they are, or integers with a scale for every block of columns."""

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels.reference.influence import integers

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: Final = ("float32", "bfloat16", "int8", "int4")
_LEVELS: Final = {"int8": 127, "int4": 7}
_FLOATS: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUERY_LEVELS: Final = 8191
_AT_ONCE: Final = 1 << 18
_DOUBLES: Final = 1 << 16


class Coded(NamedTuple):
    """Rows (n, bytes) uint8 or (n, D) floating-point, and scales (n, blocks) float32, of no column for floats."""

    rows: Tensor
    scales: Tensor


def is_coded(name: str) -> bool:
    """Whether rows of this format are integers."""
    return name in _LEVELS


def row_bytes(name: str, width: int) -> int:
    """Bytes of one row, without scales."""
    return {"float32": 4 * width, "bfloat16": 2 * width, "int8": width, "int4": (width + 1) // 2}[name]


def blocks(name: str, width: int, block: int) -> int:
    """Scales of one row."""
    return -(-width // block) if is_coded(name) else 0


def encode(x: Tensor, name: str, block: int, generator: torch.Generator | None = None) -> Coded:
    """Rows (n, D) in a format. With a generator integers are rounded up or down at random, right on average.

    `int8` is a byte of `round(x / s) + 128`, s the greatest magnitude of the block over 127; `int4` a nibble of
    `round(x / s) + 8`, s over 7, even columns in the low half of a byte. A block of zeros has scale 0.

    Raises:
        ValueError: if a row that is to be an integer is not finite.
    """
    if not is_coded(name):
        return Coded(x.to(_FLOATS[name]).contiguous(), x.new_zeros(len(x), 0, dtype=torch.float32))
    # Some rows at a time, so that what lies between stays in cache.
    step = max(1, _AT_ONCE // max(x.shape[1], 1))
    parts = [_encoded(part, name, block, generator) for part in x.split(step)]
    return Coded(torch.cat([c.rows for c in parts]), torch.cat([c.scales for c in parts]))


def _encoded(x: Tensor, name: str, block: int, generator: torch.Generator | None) -> Coded:
    levels, count = _LEVELS[name], blocks(name, x.shape[1], block)
    room = count * block - x.shape[1]
    wide = (torch.nn.functional.pad(x.float(), (0, room)) if room else x.float()).unflatten(1, (count, block))
    scales = wide.abs().amax(2) / levels
    if not bool(scales.isfinite().all()):
        raise ValueError(f"rows must be finite to be stored as {name}")
    # A subnormal scale has no reciprocal: such a block is zero.
    scales[scales < torch.finfo(torch.float32).tiny] = 0
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    # The conversion to bytes cuts off what is behind the point.
    codes = wide * inverse[..., None]
    if generator is None:
        codes.add_(levels + 1.5)
    else:
        codes.add_(torch.rand(wide.shape, generator=generator)).add_(levels + 1).clamp_(1, 2 * levels + 1)
    return Coded(_packed(codes.to(torch.uint8).flatten(1)[:, : x.shape[1]], name), scales.contiguous())


def _packed(codes: Tensor, name: str) -> Tensor:
    if name == "int8":
        return codes.contiguous()
    odd = codes.shape[1] % 2
    even = torch.nn.functional.pad(codes, (0, 1), value=8) if odd else codes.contiguous()
    pairs = even.view(torch.int16)  # the second of two in the upper byte
    return (pairs | pairs >> 4).to(torch.uint8)


def decode(coded: Coded, name: str, width: int, block: int) -> Tensor:
    """What `encode` has made of rows, (n, D) float32."""
    if not is_coded(name):
        return coded.rows.float()
    values = integers(coded.rows, name == "int4", width).float()
    return values * coded.scales.repeat_interleave(block, dim=1)[:, :width]


def squared_norms(x: Tensor) -> Tensor:
    """Of the rows (n, D), (n,) float64."""
    # Some rows at a time, whose doubles stay in cache.
    step = max(1, _DOUBLES // max(x.shape[1], 1))
    wide = x.new_empty(min(step, len(x)), x.shape[1], dtype=torch.float64)
    out = x.new_empty(len(x), dtype=torch.float64)
    for begin in range(0, len(x), step):
        part = x[begin : begin + step]
        torch.sum(wide[: len(part)].copy_(part).square_(), dim=1, out=out[begin : begin + step])
    return out


def query_codes(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) as int16 of at most 8191 and a scale each: 14 bits, so that rows alone set the error."""
    wide = queries.float()
    # Not by a number, whose reciprocal CUDA multiplies by: the codes are the same on every device.
    levels = wide.new_full((), QUERY_LEVELS)
    scales = wide.abs().amax(1) / levels if wide.shape[1] else wide.new_zeros(len(wide))
    ratio = torch.where(scales[:, None] > 0, wide / scales[:, None], 0.0)
    return ratio.round().to(torch.int16).contiguous(), scales.contiguous()

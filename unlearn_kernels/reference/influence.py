"""Random projections and top-k search in plain formulas."""

from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_LOW: Final = 0xFFFFFFFF
SIGNS_A_CALL: Final = 128
_SIGNS_AT_ONCE: Final = 1 << 24


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, seed: int) -> Words:
    """Apply ten rounds of Philox4x32 to int64 tensors of 32-bit words; key (seed mod 2^32, seed / 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        (high0, low0), (high1, low1) = _product(c0, _MULTIPLIERS[0]), _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return c0, c1, c2, c3


def _product(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Return high and low word of x m, of which int64 holds only the lower 63 bits: by 16-bit halves."""
    low, high = (x & 0xFFFF) * m, (x >> 16) * m
    middle = (low >> 16) + (high & 0xFFFF)
    return (high >> 16) + (middle >> 16), (middle & 0xFFFF) << 16 | low & 0xFFFF


def rademacher_signs(rows: Tensor, cols: Tensor, seed: int) -> Tensor:
    """Return the signs P at `rows` x `cols` (two vectors of indices) as int8 +1 and -1.

    Philox counter (row, col // 128, 0, 0); bit col % 32 of word col % 128 // 32; a set bit is +1.
    """
    blocks, where = torch.unique(cols // SIGNS_A_CALL, return_inverse=True)
    c0, c1 = torch.broadcast_tensors(rows[:, None], blocks)
    zero = torch.zeros_like(c0)
    words = torch.stack(philox4x32((c0, c1, zero, zero), seed), dim=-1)
    bits = words[:, where, cols % SIGNS_A_CALL // 32] >> cols % 32 & 1
    return (2 * bits - 1).to(torch.int8)


def rademacher_project(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    """Return `g P^T / sqrt(k)`, the signs made for some coordinates at a time.

    Columns 128 n ... 128 n + 127 of `g` are the coordinates of block n, or of block blocks[n].
    """
    out = g.new_zeros(g.shape[0], k, dtype=accumulation_dtype(g))
    rows = torch.arange(k, device=g.device)
    step = max(SIGNS_A_CALL, _SIGNS_AT_ONCE // max(k, 1) // SIGNS_A_CALL * SIGNS_A_CALL)
    for begin in range(0, g.shape[1], step):
        cols = torch.arange(begin, min(begin + step, g.shape[1]), device=g.device)
        if blocks is not None:
            cols = blocks[cols // SIGNS_A_CALL] * SIGNS_A_CALL + cols % SIGNS_A_CALL
        out += g[:, begin : begin + step].to(out.dtype) @ rademacher_signs(rows, cols, seed).to(out.dtype).T
    return out / max(k, 1) ** 0.5


def topk(queries: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Return the k best of each row of `queries rows^T`; equal ones by index, NaN above every number."""
    dtype = accumulation_dtype(queries, rows)
    values, indices = (queries.to(dtype) @ rows.to(dtype).T).sort(dim=1, descending=largest, stable=True)
    return values[:, :k].contiguous(), indices[:, :k].contiguous()


def scan_rows(queries: Tensor, rows: Tensor, k: int, ends: int) -> tuple[Tensor, Tensor]:
    """Return values and indices (ends, Q, k) of the largest and smallest of `queries rows^T`."""
    values, indices = zip(*(topk(queries, rows, k, end == 1) for end in (1, 2) if ends & end), strict=True)
    return torch.stack(values), torch.stack(indices)


def integers(rows: Tensor, nibbles: bool, width: int) -> Tensor:
    """Return the integers of stored rows (N, bytes), (N, width) int16: bytes less 128, or nibbles less 8."""
    if not nibbles:
        return rows[:, :width].to(torch.int16) - 128
    return torch.stack((rows & 15, rows >> 4), dim=2).flatten(1)[:, :width].to(torch.int16) - 8


def scan_codes(
    codes: Tensor,
    query_scales: Tensor,
    rows: Tensor,
    scales: Tensor,
    block: int,
    k: int,
    nibbles: bool,
    ends: int,
) -> tuple[Tensor, Tensor]:
    """Return values and indices (ends, Q, k) of the largest and smallest scores of integers with block scales.

    `s_q sum_b s_nb sum_{d in b} c_qd x_nd`, the inner sums exact; ranked before `s_q`, equal ones by index.
    """
    x = integers(rows, nibbles, codes.shape[1]).double()
    scores = torch.zeros(len(codes), len(x), dtype=scales.dtype, device=scales.device)
    for n, part in enumerate(codes.double().split(block, dim=1)):
        exact = part @ x[:, n * block : n * block + part.shape[1]].T
        scores += exact.to(scores.dtype) * scales[:, n]
    found = [scores.sort(dim=1, descending=end == 1, stable=True) for end in (1, 2) if ends & end]
    values = torch.stack([f.values[:, :k] for f in found]) * query_scales[:, None]
    return values, torch.stack([f.indices[:, :k] for f in found])

"""Random projections and search in CUDA C++."""

from functools import partial
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.cuda_kernels.native import run
from unlearn_kernels.triton_kernels import influence
from unlearn_kernels.triton_kernels.surgery.tables import CODES

_RUN: Final = 2048  # coordinates whose sum is a chain
_MOST_PARTS: Final = 256
_TILE: Final = 128  # rows that are scored at once
_BLOCKS: Final = 528  # that fill a GPU
_KEYS: Final = 1 << 26  # in all lists together, if more lists would only be more parallel
_LEAST_ROWS: Final = 1024  # of a list


def rademacher_project(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    """The raw operator: g (B, dim) -> (B, k), with sums in float32 (float64 for float64) and signs in registers.

    Scratch: `parts * B * k` sums, at most 256 parts of at least 8192 coordinates each.
    """
    batch, dim = g.shape
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    if g.numel() == 0 or k == 0:
        return g.new_zeros(batch, k, dtype=dtype)
    length = -(-max(8192, -(-dim // _MOST_PARTS)) // _RUN) * _RUN
    parts = torch.empty(batch * k, -(-dim // length), dtype=dtype, device=g.device)
    places = None if blocks is None else blocks.contiguous()
    sizes = (batch, dim, k, seed, length, *g.stride())
    run("sign_sums", g.device, g.data_ptr(), CODES[g.dtype], *sizes, places, parts)
    return (parts.sum(1, dtype=torch.float64) / k**0.5).to(dtype).view(batch, k)


def _search(queries: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Two launches: ranges of rows fill a list for each query, then the lists of each query become one.

    Scratch: `lists * (min(k, length) + 256)` keys of 8 bytes (float64: 16), at most 33,792 lists or one a query.
    """
    count, double = queries.shape[0], queries.dtype == torch.float64
    values = torch.empty(count, k, dtype=torch.float64 if double else torch.float32, device=rows.device)
    indices = torch.empty(count, k, dtype=torch.int64, device=rows.device)
    if count == 0:
        return values, indices
    tiles = -(-count // (8 if count <= 8 else 32 if double else 64))
    parts = max(1, min(_BLOCKS // tiles, _KEYS // (count * (k + 2 * _TILE))))
    length = -(-max(-(-rows.shape[0] // parts), 4 * k, _LEAST_ROWS) // _TILE) * _TILE
    room = min(k, length) + 2 * _TILE
    size = count * -(-rows.shape[0] // length) * room * (2 if double else 1)
    lists = torch.empty(size, dtype=torch.int64, device=rows.device)
    sides = [y for x in (queries, rows) for y in (x.data_ptr(), CODES[x.dtype], x.shape[0], *x.stride())]
    run("topk", rows.device, *sides, queries.shape[1], k, largest, length, room, lists, values, indices)
    return values, indices


# The raw operator: some queries at a time, as the Triton kernels take them.
topk: Final = partial(influence.topk, search=_search)

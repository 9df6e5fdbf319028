"""One shard of a store against queries."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import UP_TO_SINGLE, Backend, Impl, Operator, requested, select
from unlearn_kernels._loader import have_C
from unlearn_kernels.influence import _codes
from unlearn_kernels.influence._shards import Manifest, Shard
from unlearn_kernels.influence._streaming import blocks_on
from unlearn_kernels.reference import influence as reference

_FEW: Final = 128  # deleted rows that are searched with the others and left out of what is found


def _fake_rows(queries: Tensor, rows: Tensor, k: int, ends: int) -> tuple[Tensor, Tensor]:
    shape = ((ends & 1) + (ends >> 1), queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _fake_codes(
    codes: Tensor,
    query_scales: Tensor,
    rows: Tensor,
    scales: Tensor,
    block: int,
    k: int,
    nibbles: bool,
    ends: int,
) -> tuple[Tensor, Tensor]:
    return _fake_rows(codes, rows, k, ends)


_ops.register_operator(
    "scan_codes",
    "influence",
    "k best and k worst of queries (scales codes)^T",
    reference=reference.scan_codes,
    fake=_fake_codes,
    triton=_ops.launcher("influence_scan", "scan_codes"),
)
if have_C:
    _ops.register_raw("scan_rows", _fake_rows, _ops.launcher("influence", "scan_rows"))
# A part of stores alone: what it does for a matrix is `topk`'s.
_SCAN_ROWS: Final = Operator(
    "scan_rows",
    "influence",
    "k best and k worst of queries rows^T",
    {
        "cpp": Impl("cpp", _ops.raw("scan_rows"), ("cpu",), UP_TO_SINGLE, _ops.no_extension),
        "reference": Impl("reference", reference.scan_rows, ("cpu", "cuda")),
        "triton": Impl("triton", _ops.raw("scan_rows"), ("cuda",), UP_TO_SINGLE, _ops.no_triton_kernels),
    },
)
_FORMULAS: Final = (reference.scan_rows, reference.scan_codes)


def _as_gradient(queries: Tensor, rows: Tensor) -> Tensor:
    """The product behind a linear layer's gradient; torch's own has other bits for other shapes."""
    product: Tensor = _ops.raw("linear_grads")(rows.T[None], queries.T[None], False)[0][0]
    return product


_PRODUCTS: Final = Operator(
    "products",
    "influence",
    "queries rows^T",
    {
        "cpp": Impl("cpp", _as_gradient, ("cpu",), reason_unavailable=_ops.no_extension),
        "reference": Impl("reference", lambda queries, rows: queries @ rows.T, ("cpu",)),
    },
)


def products(queries: Tensor, rows: Tensor, backend: Backend | None = None) -> Tensor:
    """Inner products (Q, n) of tensors on the CPU, in their type.

    By the kernel with the same bits whatever rows and queries are beside one, at any thread count.
    """
    product: Tensor = select(_PRODUCTS, backend, (queries, rows))(queries, rows)
    return product


class Scanned(NamedTuple):
    """Queries as rows of a store are multiplied by them, on the device where that is done, scales (Q,), and by what."""

    queries: Tensor
    scales: Tensor
    scan: Callable[..., tuple[Tensor, Tensor]]


def scanned_by(queries: Tensor, manifest: Manifest, backend: Backend | None) -> Scanned:
    """Queries (Q, D) for a store: on their CUDA device if kernels run there or one is asked for, else on the CPU."""
    there = queries.is_cuda and (requested(backend) is not None or _ops.no_triton_kernels() is None)
    here = queries if there else queries.cpu()
    if _codes.is_coded(manifest.dtype):
        codes, scales = _codes.query_codes(here)
        return Scanned(codes, scales, select("scan_codes", backend, (codes,)))
    # On a GPU they are rounded as rows are, for products of one type.
    both = torch.bfloat16 if here.is_cuda and manifest.dtype == "bfloat16" else torch.float32
    scales = here.new_ones(len(here), dtype=torch.float32)
    return Scanned(here.to(both), scales, select(_SCAN_ROWS, backend, (here,)))


def scan_shard(shard: Shard, of: Scanned, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    """Values (Q, at most k), unscaled, and rows of the shard, for each end asked for (1 largest, 2 smallest, 3 both).

    Where the queries are; rows are brought there a block after the other.
    """
    gone, left = shard.info.deleted_rows, shard.info.rows - shard.info.deleted_rows
    if left == 0:
        none = of.queries.new_zeros(len(of.queries), 0, dtype=torch.int64)
        return [(none.float(), none)] * len(_ends(ends))
    if gone > max(k, _FEW):
        kept = shard.kept.to(of.queries.device)
        return [(values, kept[rows]) for values, rows in _found(shard, of, min(k, left), ends, shard.kept)]
    found = _found(shard, of, min(shard.info.rows, k + gone), ends, None)
    return [_without_deleted(shard, values, rows, k) for values, rows in found]


def _found(shard: Shard, of: Scanned, k: int, ends: int, kept: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """The k best of the rows of a shard, or of those that are kept, by their number among them."""
    manifest, best = shard.manifest, None
    how = (manifest.block, manifest.dtype == "int4")
    if kept is None and of.scan in _FORMULAS:  # a block at a time: they have every score in memory
        kept = torch.arange(shard.info.rows)
    for first, (rows, scales) in blocks_on((shard.rows, shard.scales), of.queries.device, kept):
        values, indices = _scan(of, rows, scales, min(k, len(rows)), ends, *how)
        found = (values, indices + first if first else indices)
        best = found if best is None else _best(best, found, k, ends)
    assert best is not None
    return list(zip(*best, strict=True))


def _scan(
    of: Scanned, rows: Tensor, scales: Tensor, k: int, ends: int, block: int, nibbles: bool
) -> tuple[Tensor, Tensor]:
    if of.queries.is_floating_point():
        return of.scan(of.queries, rows, k, ends)
    ones = scales.new_ones(len(of.queries))
    return of.scan(of.queries, ones, rows, scales, block, k, nibbles, ends)


def _best(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], k: int, ends: int
) -> tuple[Tensor, Tensor]:
    """The k best, (ends, Q, k), of two lists in order, every row of the first before those of the second."""
    values, rows = (torch.cat(pair, dim=2) for pair in zip(before, after, strict=True))
    sides = [values[n].sort(dim=1, descending=end == 1, stable=True) for n, end in enumerate(_ends(ends))]
    order = torch.stack([side.indices[:, :k] for side in sides])
    return torch.stack([side.values[:, :k] for side in sides]), rows.gather(2, order)


def _ends(ends: int) -> list[int]:
    return [end for end in (1, 2) if ends & end]


def _without_deleted(shard: Shard, values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    left = shard.info.rows - shard.info.deleted_rows
    if shard.info.deleted_rows == 0:
        return values[:, :k], rows[:, :k]
    gone = torch.isin(rows, shard.deleted.to(rows.device))
    order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : min(k, left)]
    return values.gather(1, order), rows.gather(1, order)

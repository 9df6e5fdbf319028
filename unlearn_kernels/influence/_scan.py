"""One shard of a store against queries."""

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._loader import have_C
from unlearn_kernels.influence import _codes
from unlearn_kernels.influence._shards import Shard
from unlearn_kernels.reference import influence as reference


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


if have_C:
    _ops.register_raw("scan_rows", _fake_rows, None)
    _ops.register_raw("scan_codes", _fake_codes, None)


def products(queries: Tensor, rows: Tensor) -> Tensor:
    """Inner products (Q, n), float32, with the same bits whatever rows and queries are beside one, at any thread count.

    It is the product behind a linear layer's gradient; torch's own has other bits for other shapes.
    """
    if not have_C:
        return queries @ rows.T
    return _ops.raw("linear_grads")(rows.T[None], queries.T[None], False)[0][0]


def scan_shard(shard: Shard, queries: Tensor, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    """Values (Q, at most k) and rows of the shard, for each end that is asked for (1 largest, 2 smallest, 3 both)."""
    most = min(shard.info.rows, k + shard.info.deleted_rows)
    found = _kernel(shard, queries, most, ends) if have_C else _plain(shard, queries, most, ends)
    return [_without_deleted(shard, values, rows, k) for values, rows in found]


def _kernel(shard: Shard, queries: Tensor, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    manifest = shard.manifest
    if _codes.is_coded(manifest.dtype):
        codes, scales = _codes.query_codes(queries)
        values, rows = _ops.raw("scan_codes")(
            codes, scales, shard.rows, shard.scales, manifest.block, k, manifest.dtype == "int4", ends
        )
    else:
        values, rows = _ops.raw("scan_rows")(queries.to(shard.rows.dtype), shard.rows, k, ends)
    return list(zip(values, rows, strict=True))


def _plain(shard: Shard, queries: Tensor, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    rows = shard.decoded(slice(None))
    return [reference.topk(queries, rows, k, end == 1) for end in (1, 2) if ends & end]


def _without_deleted(shard: Shard, values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    left = shard.info.rows - shard.info.deleted_rows
    if shard.info.deleted_rows == 0:
        return values[:, :k], rows[:, :k]
    gone = torch.isin(rows, shard.deleted)
    order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : min(k, left)]
    return values.gather(1, order), rows.gather(1, order)

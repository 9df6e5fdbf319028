"""One shard of a store against queries."""

from collections.abc import Callable

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._loader import have_C
from unlearn_kernels.influence import _codes
from unlearn_kernels.influence._shards import Shard
from unlearn_kernels.influence._streaming import blocks_on
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


def products(queries: Tensor, rows: Tensor) -> Tensor:
    """Inner products (Q, n), float32, with the same bits whatever rows and queries are beside one, at any thread count.

    It is the product behind a linear layer's gradient; torch's own has other bits for other shapes.
    """
    if not have_C:
        return queries @ rows.T
    return _ops.raw("linear_grads")(rows.T[None], queries.T[None], False)[0][0]


def on_a_scanner(queries: Tensor) -> Tensor:
    """The queries where rows can be scanned: on their CUDA device if kernels run there, otherwise on the CPU."""
    return queries if queries.is_cuda and _ops.no_triton_kernels() is None else queries.cpu()


def scan_shard(shard: Shard, queries: Tensor, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    """Values (Q, at most k) and rows of the shard, for each end that is asked for (1 largest, 2 smallest, 3 both).

    Where the queries are; rows are brought there a block after the other.
    """
    most = min(shard.info.rows, k + shard.info.deleted_rows)
    found = _kernel(shard, queries, most, ends) if have_C else _plain(shard, queries, most, ends)
    return [_without_deleted(shard, values, rows, k) for values, rows in found]


def _kernel(shard: Shard, queries: Tensor, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    manifest = shard.manifest
    if not _codes.is_coded(manifest.dtype):
        same = queries.to(shard.rows.dtype)

        def scan(rows: Tensor, _: Tensor, most: int) -> tuple[Tensor, Tensor]:
            found: tuple[Tensor, Tensor] = _ops.raw("scan_rows")(same, rows, most, ends)
            return found

        return _over_blocks(shard, queries.device, k, ends, scan)
    codes, scales = _codes.query_codes(queries)
    ones = torch.ones_like(scales)

    def scan_coded(rows: Tensor, row_scales: Tensor, most: int) -> tuple[Tensor, Tensor]:
        how = (manifest.block, most, manifest.dtype == "int4", ends)
        found: tuple[Tensor, Tensor] = _ops.raw("scan_codes")(codes, ones, rows, row_scales, *how)
        return found

    # Scaled at the end: scores that rounding makes equal would be ordered by another rule.
    best = _over_blocks(shard, queries.device, k, ends, scan_coded)
    return [(values * scales[:, None], rows) for values, rows in best]


def _over_blocks(
    shard: Shard,
    device: torch.device,
    k: int,
    ends: int,
    scan: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> list[tuple[Tensor, Tensor]]:
    """The best of what `scan` finds in each block of rows that is brought to the device; on the CPU there is one."""
    best: tuple[Tensor, Tensor] | None = None
    for first, (rows, scales) in blocks_on((shard.rows, shard.scales), device):
        values, indices = scan(rows, scales, min(k, len(rows)))
        found = (values, indices + first if first else indices)
        best = found if best is None else _best(best, found, k, ends)
    assert best is not None
    return list(zip(*best, strict=True))


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


def _plain(shard: Shard, queries: Tensor, k: int, ends: int) -> list[tuple[Tensor, Tensor]]:
    rows = shard.decoded(slice(None)).to(queries.device)
    return [reference.topk(queries, rows, k, end == 1) for end in _ends(ends)]


def _without_deleted(shard: Shard, values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    left = shard.info.rows - shard.info.deleted_rows
    if shard.info.deleted_rows == 0:
        return values[:, :k], rows[:, :k]
    gone = torch.isin(rows, shard.deleted.to(rows.device))
    order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, : min(k, left)]
    return values.gather(1, order), rows.gather(1, order)

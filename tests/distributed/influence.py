"""Gradient stores in each process of the distributed tests."""

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlearn_kernels import BackendError
from unlearn_kernels.influence import (
    Ends,
    Found,
    GradientStore,
    InfluenceCollector,
    Projection,
    RankedStore,
    StoreError,
)
from unlearn_kernels.testing import randn, relative_error

ROWS, WIDTH = 150, 33


def same(one: Found, other: Found) -> bool:
    return all(torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in zip(one, other, strict=True))


def shared_folder() -> Path:
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    assert box[0] is not None
    return Path(box[0])


def share(rank: int, world: int) -> slice:
    """Uneven, and the last rank has one row."""
    edges = [0, *(ROWS * (r + 1) // (2 * world) for r in range(world - 1)), ROWS]
    edges[-2] = ROWS - 1
    return slice(edges[rank], edges[rank + 1])


def filled(path: Path, dtype: str, rows: Tensor, ids: Tensor, shards: int) -> GradientStore:
    store = GradientStore.create(path, WIDTH, dtype, block=16)
    for part, numbers in zip(rows.tensor_split(shards), ids.tensor_split(shards), strict=True):
        store.append(part, numbers)
        store.flush()
    return store


def check_search(dtype: str, rows: Tensor, k: int) -> None:
    """Every answer is that of one store, bit for bit."""
    folder, rank, world = shared_folder(), dist.get_rank(), dist.get_world_size()
    ids, mine = torch.arange(ROWS) * 7 % 1000, share(rank, world)
    one = filled(folder / f"whole-{rank}", dtype, rows, ids, 1)
    many = RankedStore(filled(folder / f"{rank:05d}", dtype, rows[mine], ids[mine], 2))
    assert len(many) == ROWS
    queries, fold = randn(4, WIDTH, seed=1), randn(WIDTH, WIDTH, seed=2)
    for preconditioner in (None, fold):
        options = {"preconditioner": preconditioner}
        both, exact = many.ends(queries, k, **options), one.ends(queries, k, **options)
        assert isinstance(both, Ends)
        assert same(both.largest, exact.largest)
        assert same(both.smallest, exact.smallest)
        assert same(many.topk(queries, k, largest=False, **options), exact.smallest)
        found, scores = many.scores(queries, **options)
        assert torch.equal(found, one.ids())
        whole = torch.cat([s for _, s in one.scores(queries, **options)], 1)
        assert torch.equal(scores.nan_to_num(9e9), whole.nan_to_num(9e9))
        own, theirs = (x.self_influence(preconditioner).nan_to_num(9, 9, 9) for x in (many, one))
        assert relative_error(own, theirs) < 1e-6
    assert torch.equal(many.sqnorms().nan_to_num(9), one.sqnorms().nan_to_num(9))
    gone = ids[torch.tensor([0, 3, ROWS - 1])]
    assert many.delete(gone) == one.delete(gone) == 3
    assert len(many) == ROWS - 3
    assert same(many.topk(queries, ROWS - 3), one.topk(queries, ROWS - 3))
    for wrong in (-1, ROWS):
        with pytest.raises(ValueError, match=f"k must be between 0 and {ROWS - 3} rows"):
            many.topk(queries, wrong)


def check_changes() -> None:
    """Stores that changed by themselves are counted anew; what one rank may not do, none does."""
    folder, rank, world = shared_folder(), dist.get_rank(), dist.get_world_size()
    store = filled(
        folder / f"{rank:05d}", "float32", randn(4, WIDTH, seed=rank), torch.arange(4) + 10 * rank, 1
    )
    many = RankedStore(store)
    store.delete([10 * rank] if rank else [])
    assert many.ids().tolist() == [10 * r + n for r in range(world) for n in range(4) if r == 0 or n]
    queries = randn(2, WIDTH)
    plain = many.topk(queries, 3, backend="reference")
    assert relative_error(plain.values, many.topk(queries, 3).values) < 1e-6
    with pytest.raises(BackendError, match="scan_rows: backend 'cuda' was requested"):
        many.ends(queries, 3, backend="cuda")
    with pytest.raises(BackendError, match="products: backend 'cuda' was requested"):
        many.scores(queries, backend="cuda")
    assert many.topk(queries, 4 + 3 * (world - 1)).ids.sort().values[0].tolist() == many.ids().tolist()
    if rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "delete", lambda _: (_ for _ in ()).throw(OSError("disk")))
            with pytest.raises(OSError, match="disk"):
                many.delete([1])
    else:
        with pytest.raises(StoreError, match=r"delete failed on ranks \[1\]"):
            many.delete([-1])
    if rank:
        store.close()
        many.store = GradientStore.open(store.path)
    with pytest.raises(StoreError, match=r"open for writing on all ranks, got \[1, 0"):
        many.delete([1])
    assert len(many.ids()) == 4 + 3 * (world - 1)


def check_collection() -> None:
    """Each process collects its share; together they have what one process has."""
    folder, rank, world = shared_folder(), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model, x, n = nn.Linear(6, 4), randn(41, 6), 41
    projection = Projection(28, WIDTH)
    stores = []
    for name, items in (("one", range(n)), ("many", range(n * rank // world, n * (rank + 1) // world))):
        store = InfluenceCollector.store(folder / f"{name}-{rank}", model, projection)
        collector = InfluenceCollector(model, projection, store, loss=lambda m, b: m(b).square().sum(1))
        collector.collect(x, items=items, batch_size=5)
        stores.append(store)
    many = RankedStore(stores[1])
    assert torch.equal(many.ids(), torch.arange(n))
    queries = randn(3, WIDTH, seed=4)
    one, all_ = stores[0].topk(queries, 5), many.topk(queries, 5)
    assert torch.equal(one.ids, all_.ids)
    assert relative_error(all_.values, one.values) < 1e-5


def check() -> None:
    ties = (torch.arange(ROWS * WIDTH).view(ROWS, WIDTH) % 5 - 2).float()
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        check_search(dtype, randn(ROWS, WIDTH), 20)
    check_search("float32", ties, ROWS)
    check_search("int8", ties, 60)
    missing = randn(ROWS, WIDTH)
    missing[5, 3], missing[ROWS - 1, 0] = float("nan"), float("inf")
    check_search("float32", missing, 7)
    check_changes()
    check_collection()

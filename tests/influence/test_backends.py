"""`backend=` of searches of a store, of `datainf` and of updates of a factor: what was asked for runs, or it raises."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.influence.stores import FORMATS, filled
from unlearn_kernels import BackendError, use_backend
from unlearn_kernels._loader import have_C
from unlearn_kernels.influence import (
    GradientStore,
    Woodbury,
    _streaming,
    cholesky_update,
    datainf,
    datainf_damping,
    squared_norms,
)
from unlearn_kernels.testing import randn, relative_error

pytestmark = pytest.mark.skipif(not have_C, reason="needs the compiled extension")
ALL = pytest.mark.parametrize("dtype", FORMATS)


def kernels(call: Callable[[], object]) -> set[str]:
    """The operators of ours that a call runs."""
    found = set()

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "unlearn_kernels":
                found.add(func._opname)
            return func(*args, **(kwargs or {}))

    with Names():
        call()
    return found


@ALL
@pytest.mark.parametrize("count", [2, 20])
def test_searches_by_the_reference(tmp_path: Path, dtype: str, count: int) -> None:
    store = filled(tmp_path, dtype, randn(300, 33), block=16)
    store.delete([3, 150, *range(200, 290)])
    queries = randn(count, 33, seed=1)
    for plain, found in zip(
        store.ends(queries, 40, backend="reference"), store.ends(queries, 40, backend="cpp"), strict=True
    ):
        assert relative_error(plain.values, found.values) < 1e-6
        assert torch.equal(plain.ids, found.ids)
        assert torch.equal(plain.indices, found.indices)
    with use_backend("reference"):
        again = store.topk(queries, 40, largest=False)
    assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))
    parts = [[s for _, s in store.scores(queries, backend=name)] for name in ("reference", "cpp")]
    assert relative_error(torch.cat(parts[0], 1), torch.cat(parts[1], 1)) < 1e-6


@ALL
def test_equal_scores_by_the_reference(tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, in blocks of few rows: the order of the kernel."""
    monkeypatch.setattr(_streaming, "_BLOCK_BYTES", 100)
    store = filled(tmp_path, dtype, (torch.arange(200 * 6).reshape(200, 6) % 7 - 3).float())
    queries = torch.tensor([[1.0, 0, 2, 0, 0, 1], [-1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    for plain, found in zip(
        store.ends(queries, 150, backend="reference"), store.ends(queries, 150), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


@ALL
def test_what_was_asked_for_runs(tmp_path: Path, dtype: str) -> None:
    store, queries = filled(tmp_path, dtype, randn(30, 8)), randn(2, 8, seed=1)
    scan = "scan_codes" if dtype.startswith("int") else "scan_rows"
    for call, name in (
        (lambda **how: store.topk(queries, 3, **how), scan),
        (lambda **how: store.ends(queries, 3, **how), scan),
        (lambda **how: list(store.scores(queries, **how)), "linear_grads"),
        (lambda **how: store.append(randn(4, 8), **how), "encode_rows"),
    ):
        assert kernels(call) == kernels(lambda call=call: call(backend="cpp")) == {name}
        assert kernels(lambda call=call: call(backend="reference")) == set()
        for asked in ("triton", "cuda"):
            with pytest.raises(
                BackendError, match=rf": backend '{asked}' was requested but .* Pass backend='cpp'"
            ):
                call(backend=asked)
            with use_backend(asked), pytest.raises(BackendError, match=f"backend '{asked}' was requested"):
                call()
        with pytest.raises(
            ValueError, match="backend must be one of reference, cpp, triton, cuda, got 'gpu'"
        ):
            call(backend="gpu")
    store.flush()
    assert store.ids().tolist() == list(range(42))  # what raised has left nothing


def test_encoded_by_the_reference(tmp_path: Path) -> None:
    stores = [GradientStore.create(tmp_path / name, 33, "int8", block=16) for name in ("reference", "cpp")]
    for store in stores:
        store.append(randn(50, 33), backend=store.path.name)
        store.flush()
    (_, plain), (_, rows) = (next(store.blocks()) for store in stores)
    assert torch.equal(plain, rows)
    assert relative_error(stores[0].sqnorms(), stores[1].sqnorms()) < 1e-12


@pytest.mark.parametrize("count", [1, 16, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_datainf(count: int, dtype: torch.dtype) -> None:
    rows = [randn(25, d, dtype=dtype, seed=d) + 0.1 for d in (1, 37, 5000)]
    queries = [randn(count, d, dtype=dtype, seed=d + 1) for d in (1, 37, 5000)]
    norms = squared_norms(rows)
    assert relative_error(squared_norms(rows, backend="reference"), norms) < 1e-12

    def scores(**how: Any) -> torch.Tensor:
        return datainf(rows, queries, norms=norms, **how)

    plain = scores(backend="reference")
    assert relative_error(scores(backend="cpp"), plain) < 1e-6
    assert kernels(lambda: scores(backend="reference")) == set()
    assert kernels(lambda: scores(backend="cpp")) == {"datainf_scores"}
    assert kernels(scores) == ({"datainf_scores"} if count <= 16 else set())
    with use_backend("reference"):
        assert torch.equal(scores(), plain)
    for asked in ("triton", "cuda"):
        with pytest.raises(BackendError, match=f"datainf: backend '{asked}' .* no such implementation"):
            scores(backend=asked)
        with pytest.raises(BackendError, match=f"backend '{asked}' was requested"):
            squared_norms(rows, backend=asked)


def test_datainf_in_float64_has_no_kernel() -> None:
    rows, queries = [randn(5, 7, dtype=torch.float64)], [randn(2, 7, dtype=torch.float64, seed=1)]
    norms = squared_norms(rows)
    plain = datainf(rows, queries, norms=norms, backend="reference")
    assert torch.equal(datainf(rows, queries, norms=norms), plain)
    with pytest.raises(BackendError, match=r"datainf: .* does not take torch.float64. .* here: reference"):
        datainf(rows, queries, backend="cpp")


def test_datainf_by_the_kernel_where_terms_cancel() -> None:
    g = randn(1, 20_000).expand(8, -1).contiguous()
    v = g[:1] + 0.01 * randn(17, 20_000, seed=2)
    exact = datainf([g.double()], [v.double()], damping=datainf_damping([g], squared_norms([g])))
    assert relative_error(datainf([g], [v], backend="cpp"), exact) < 1e-6


def test_updates_of_a_factor() -> None:
    a, x = randn(50, 41, dtype=torch.float64), randn(3, 41, dtype=torch.float64, seed=1)
    factor = torch.linalg.cholesky(a.T @ a + torch.eye(41), upper=True)
    up = cholesky_update(factor, x)
    assert relative_error(cholesky_update(factor, x, backend="reference"), up) < 1e-12
    assert relative_error(cholesky_update(up, x, downdate=True, backend="reference"), factor) < 1e-10
    assert kernels(lambda: cholesky_update(factor, x)) == {"cholesky_update"}
    assert kernels(lambda: cholesky_update(factor, x, backend="reference")) == set()
    for name in ("cpp", "reference"):
        with pytest.raises(ValueError, match=r"pivot \d+ is not positive"):
            cholesky_update(factor, 100 * x, downdate=True, backend=name)
    for asked in ("triton", "cuda"):
        with pytest.raises(
            BackendError, match=f"cholesky_update: backend '{asked}' .* no such implementation"
        ):
            cholesky_update(factor, x, backend=asked)


def test_rows_removed_by_the_reference() -> None:
    rows, v = randn(40, 120), randn(3, 120, seed=1)
    plain, fast = Woodbury(rows, 0.01), Woodbury(rows, 0.01)
    with pytest.raises(BackendError, match="cholesky_update: backend 'triton'"):
        plain.remove([39, 3, 17], backend="triton")
    assert len(plain) == 40
    plain.remove([39, 3, 17], backend="reference")
    fast.remove([39, 3, 17])
    assert relative_error(plain.solve(v).x, fast.solve(v).x) < 1e-6

"""Inverse products against dense float64 solutions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_kernels.influence import (
    Woodbury,
    arnoldi,
    cg,
    cholesky_update,
    datainf,
    datainf_damping,
    lissa,
    squared_norms,
    woodbury,
    woodbury_solve,
)
from unlearn_kernels.testing import at_threads, randn, relative_error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def fisher(rows: torch.Tensor, damping: float, n: int | None = None) -> torch.Tensor:
    rows = rows.double()
    return damping * torch.eye(rows.shape[1], dtype=torch.float64) + rows.T @ rows / (n or len(rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (40, 300), (300, 40), (7, 131)])
@pytest.mark.parametrize("damping", [1.0, 1e-4])
def test_woodbury(dtype: torch.dtype, shape: tuple[int, int], damping: float) -> None:
    rows, v = randn(*shape, dtype=dtype), randn(5, shape[1], dtype=dtype, seed=1)
    x, residual = woodbury_solve(rows, v, damping)
    assert x.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = torch.linalg.solve(fisher(rows, damping), v.double().T).T
    assert relative_error(x, exact) < 1e-6
    left = (x.double() @ fisher(rows, damping) - v.double()).norm(dim=1) / v.double().norm(dim=1)
    assert relative_error(residual, left) < 1e-3 or residual.max() < 1e-10
    single, its = woodbury_solve(rows, v[0], damping)
    assert relative_error(single, exact[0]) < 1e-6
    assert its.dim() == 0


def flawed_woodfisher(rows: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The recursion of the IU baseline, whose vector o only ever changes its length."""
    o, k, n = rows[0].clone(), v.clone(), len(rows)
    for g in rows[1:]:
        k = k - (k @ g) / (n + o @ g) * o
        o = o - (o @ g) / (n + o @ g) * o
    return k


def test_woodbury_is_right_where_the_baseline_is_not() -> None:
    rows, v = randn(60, 200, dtype=torch.float64), randn(200, dtype=torch.float64, seed=1)
    exact = torch.linalg.solve(fisher(rows, 1.0), v)
    assert relative_error(woodbury_solve(rows, v, 1.0).x, exact) < 1e-12
    wrong = flawed_woodfisher(rows, v)
    moved = torch.nn.functional.cosine_similarity(v - wrong, rows[0], dim=0)
    assert abs(abs(moved.item()) - 1) < 1e-9
    assert relative_error(wrong, exact) > 0.1


@pytest.mark.parametrize("removed", [[0], [39], [3, 17, 4], list(range(1, 40)), []])
def test_downdate_equals_refactoring(removed: list[int]) -> None:
    rows, v = randn(40, 120), randn(3, 120, seed=1)
    w = Woodbury(rows, 0.01)
    for index in (removed[:2], removed[2:]):
        w.remove(index)
    left = torch.tensor([i for i in range(40) if i not in removed])
    assert torch.equal(w.kept, left)
    exact = torch.linalg.solve(fisher(rows[left], 0.01, 40), v.double().T).T
    assert relative_error(w.solve(v).x, exact) < 1e-6
    assert w.solve(v.double()).residual.max() < 1e-11
    fresh = Woodbury(rows[left], 0.01 * 40 / len(left))
    assert relative_error(w._factor, fresh._factor) < 1e-12


def test_remove_and_constructor_errors() -> None:
    w = Woodbury(randn(5, 8), 1.0)
    w.remove([2])
    for bad in ([2], [5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="index must name different rows that are left"):
            w.remove(bad)
    for bad, dtype in ((torch.tensor([False, True]), "bool"), ([True], "bool"), ([1.0], "float32")):
        with pytest.raises(ValueError, match=rf"index must be integers, got torch\.{dtype}"):
            w.remove(bad)
    assert len(w) == 4
    w.remove([0, 1, 3, 4])
    with pytest.raises(ValueError, match=r"got 0, first of 1 that are gone or given twice$"):
        w.remove([0])
    with pytest.raises(ValueError, match=r"got 0, first of 100000 that are gone or given twice$"):
        w.remove(torch.arange(100_000))
    with pytest.raises(ValueError, match="v must have 8 columns, got shape"):
        w.solve(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        Woodbury(randn(5, 8), 0)
    with pytest.raises(ValueError, match="rows must be"):
        Woodbury(torch.zeros(0, 8), 1.0)


@pytest.mark.parametrize(
    ("rows", "damping"),
    [(torch.ones(3, 4), 1e-30), (torch.full((3, 4), torch.nan), 1.0), (torch.tensor([[torch.inf]]), 1.0)],
)
def test_rows_without_a_factor(rows: torch.Tensor, damping: float) -> None:
    with pytest.raises(ValueError, match="rows must be finite and damping large enough to factor"):
        Woodbury(rows, damping)


def test_rows_are_copied_by_columns_after_remove(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(woodbury, "_COLUMNS", 16)
    rows, v = randn(6, 100), randn(2, 100, seed=1)
    w = Woodbury(rows, 0.1)
    w.remove([1])
    widest = 0

    class Widths(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.index.Tensor:
                widest = max(widest, out.shape[1])
            return out

    with Widths():
        x = w.solve(v).x
    assert widest == 16
    left = rows[[0, 2, 3, 4, 5]]
    assert relative_error(x, torch.linalg.solve(fisher(left, 0.1, 6), v.double().T).T) < 1e-6
    assert torch.equal(w.rows, left)


@pytest.mark.parametrize("rows", [1, 3, 60])
def test_cholesky_update(rows: int) -> None:
    a, x = randn(50, 41, dtype=torch.float64), randn(rows, 41, dtype=torch.float64, seed=1)
    base = a.T @ a + torch.eye(41)
    factor = torch.linalg.cholesky(base, upper=True)
    up = cholesky_update(factor, x)
    assert relative_error(up, torch.linalg.cholesky(base + x.T @ x, upper=True)) < 1e-12
    assert relative_error(cholesky_update(up, x, downdate=True), factor) < 1e-10
    with pytest.raises(ValueError, match=r"pivot \d+ is not positive"):
        cholesky_update(factor, 100 * x, downdate=True)
    with pytest.raises(ValueError, match="factor and x must be"):
        cholesky_update(factor, x[:, 1:])


def layers(dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    sizes = (1, 37, 300, 5000)
    rows = [randn(25, d, dtype=dtype, seed=d) + 0.1 for d in sizes]
    return rows, [randn(6, d, dtype=dtype, seed=d + 1) for d in sizes]


def datainf64(rows: list, queries: list, damping: torch.Tensor) -> torch.Tensor:
    """The average of the inverses, each written out."""
    total = torch.zeros(len(queries[0]), len(rows[0]), dtype=torch.float64)
    for g, v, lam in zip(rows, queries, damping, strict=True):
        g, v = g.double(), v.double()
        u = torch.zeros_like(v)
        for row in g:
            u += (v - (v @ row)[:, None] / (lam + row @ row) * row) / lam / len(g)
        total += u @ g.T
    return total


@pytest.mark.parametrize("dtype", DTYPES)
def test_datainf(dtype: torch.dtype) -> None:
    rows, queries = layers(dtype)
    norms = squared_norms(rows)
    damping = datainf_damping(rows, norms)
    exact = datainf64(rows, queries, damping)
    assert relative_error(datainf(rows, queries), exact) < 1e-6
    many = [q.repeat(4, 1) for q in queries]
    assert relative_error(datainf(rows, many, norms=norms), exact.repeat(4, 1)) < 2e-6
    fixed = torch.full((4,), 0.3, dtype=torch.float64)
    assert relative_error(datainf(rows, queries, damping=fixed), datainf64(rows, queries, fixed)) < 1e-6
    strided = [g.T.contiguous().T for g in rows]
    assert relative_error(datainf(strided, queries), exact) < 1e-6


def test_datainf_is_the_same_at_every_thread_count() -> None:
    rows, queries = layers()
    one, two, four = at_threads((1, 2, 4), lambda: datainf(rows, queries))
    assert torch.equal(one, two)
    assert torch.equal(one, four)


@pytest.mark.parametrize("queries", [1, 16, 17])
@pytest.mark.parametrize(("noise", "bound"), [(0.0, 1e-6), (0.01, 1e-6), (0.1, 2e-4)])
def test_datainf_of_nearly_parallel_rows(noise: float, bound: float, queries: int) -> None:
    """The two terms of the formula cancel but for 1 in 10 d of them."""
    g = randn(1, 20_000) + noise * randn(8, 20_000, seed=1)
    v = g[:1] + 0.01 * randn(queries, 20_000, seed=2)
    exact = datainf64([g], [v], datainf_damping([g], squared_norms([g])))
    assert relative_error(datainf([g], [v]), exact) < bound
    beside_others = datainf([g], [torch.cat([g[1:4], v[:1]])])[3]
    assert relative_error(beside_others, exact[0]) < bound


@pytest.mark.parametrize("queries", [2, 17])
def test_datainf_of_layers_without_gradients(queries: int) -> None:
    """As at the start of LoRA, where B is zero: they add nothing."""
    g, v = randn(5, 8), randn(queries, 8, seed=1)
    dead, other = torch.zeros(5, 3), randn(queries, 3, seed=2)
    assert torch.equal(datainf([dead, g], [other, v]), datainf([g], [v]))
    assert torch.equal(datainf([dead], [other]), torch.zeros(queries, 5, dtype=torch.float64))
    damping = torch.tensor([0.0, 0.3])
    assert torch.equal(
        datainf([dead, g], [other, v], damping=damping), datainf([g], [v], damping=damping[1:])
    )
    with pytest.raises(ValueError, match=r"damping must be positive, got 0\.0 for layer 1"):
        datainf([dead, g], [other, v], damping=torch.zeros(2))


def test_datainf_errors() -> None:
    rows, queries = layers()
    for call, message in (
        (lambda: datainf(rows[1:], queries), "as many layers, got 3 and 4"),
        (lambda: datainf(rows, queries, damping=torch.zeros(4)), r"positive, got 0\.0 for layer 0"),
        (lambda: datainf(rows, queries, norms=torch.full((4, 25), torch.nan)), "finite, got nan in layer 0"),
        (lambda: datainf(rows[:1], [queries[0].long()]), r"got torch\.float32 and torch\.int64"),
        (lambda: datainf(rows[:2], [queries[0], queries[1][1:]]), "layer 1 must have 6 queries, got 5"),
        (
            lambda: datainf(rows, queries, norms=torch.ones(3, 25)),
            r"norms must have shape \(4, 25\), got \(3, 25\)",
        ),
        (lambda: datainf([rows[0], rows[1][1:]], queries[:2]), "layer 1 must have rows"),
        (lambda: datainf([rows[0][:0]], queries[:1]), r"rows must not be empty, got \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def system(size: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    a = randn(50, size, dtype=torch.float64)
    return a.T @ a / 50, randn(4, size, dtype=torch.float64, seed=1)


def test_cg_stops_each_side_at_its_residual() -> None:
    H, v = system()
    v[2] = 0
    calls = []

    def hvp(x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return x @ H

    x, residual, iterations = cg(hvp, v, damping=0.1, tol=1e-10)
    dense = H + 0.1 * torch.eye(30)
    assert relative_error(x, torch.linalg.solve(dense, v.T).T) < 1e-8
    assert residual.max() < 1e-9
    assert iterations[2] == 0
    assert iterations.max() == len(calls) - 1 < 60
    assert max(calls[:-1]) == 3
    few = cg(hvp, v, damping=0.1, tol=1e-1)
    assert few.iterations.max() < iterations.max()
    assert 1e-6 < few.residual[0] < 0.15
    limited = cg(hvp, v, damping=0.1, tol=1e-10, max_iter=2)
    assert limited.iterations.tolist() == [2, 2, 0, 2]
    true = (limited.x @ dense - v).norm(dim=1)
    assert relative_error(limited.residual[:2], (true / v.norm(dim=1))[:2]) < 1e-12


@pytest.mark.parametrize(
    "solve",
    [
        lambda hvp: cg(hvp, torch.ones(2, 3)),
        lambda hvp: lissa(hvp, torch.ones(2, 3), scale=2.0),
        lambda hvp: arnoldi(hvp, torch.ones(3), steps=2, top=1),
    ],
)
def test_products_of_another_shape_are_refused(solve: Callable) -> None:
    with pytest.raises(ValueError, match=r"hvp must return \(\d, 3\) for that shape, got \(\d, 1\)"):
        solve(lambda x: x[:, :1])


def test_cg_on_an_indefinite_matrix_does_not_blow_up() -> None:
    H = torch.diag(torch.tensor([1.0, -1.0, 2.0]))
    x, residual, _ = cg(lambda x: x @ H, torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]))
    assert torch.equal(x[0], torch.zeros(3))
    assert residual[0] == 1
    assert residual[1] < 1e-6


def test_lissa() -> None:
    H, v = system()
    scale = float(torch.linalg.eigvalsh(H)[-1]) + 0.1
    x, residual, iterations = lissa(lambda x: x @ H, v, damping=0.1, scale=scale, tol=1e-9)
    assert relative_error(x, torch.linalg.solve(H + 0.1 * torch.eye(30), v.T).T) < 1e-6
    assert residual.max() < 1e-6
    assert iterations.max() < 1000
    with pytest.raises(ArithmeticError, match="lissa diverges at scale"):
        lissa(lambda x: x @ H, v, damping=0.1, scale=scale / 10)
    with pytest.raises(ValueError, match="scale must be positive"):
        lissa(lambda x: x @ H, v, scale=0)


def test_arnoldi() -> None:
    H, v = system()
    values, vectors, residual = pairs = arnoldi(lambda x: x @ H, v[0], steps=30, top=30)
    assert relative_error(values, torch.linalg.eigvalsh(H).flip(0)) < 1e-8
    assert residual.max() < 1e-8
    assert relative_error(vectors @ vectors.T, torch.eye(30)) < 1e-8
    dense = H + 0.1 * torch.eye(30)
    x, left = pairs.solve(v, damping=0.1)
    assert relative_error(x, torch.linalg.solve(dense, v.T).T) < 1e-6
    assert left.max() < 1e-6
    few = arnoldi(lambda x: x @ H, v[0], steps=20, top=3)
    x, left = few.solve(v, damping=0.1)
    true = (x @ dense - v).norm(dim=1) / v.norm(dim=1)
    assert ((true <= left) & (left < 1.01 * true)).all()
    assert (few.solve(torch.zeros(1, 30, dtype=torch.float64)).residual == 0).all()
    assert relative_error(few.values, values[:3]) < 1e-4
    low = torch.diag(torch.tensor([3.0, -5.0, 0.0, 0.0]))
    pairs = arnoldi(lambda x: x @ low, torch.ones(4), steps=4, top=4)
    assert len(pairs.values) == 3
    assert relative_error(pairs.values[:2], torch.tensor([-5.0, 3.0])) < 1e-6
    with pytest.raises(ValueError, match="start must be a vector other than 0"):
        arnoldi(lambda x: x, torch.zeros(3), steps=2, top=1)
    with pytest.raises(ValueError, match="top must be between 1 and 2 steps, got 3"):
        arnoldi(lambda x: x, torch.ones(3), steps=2, top=3)

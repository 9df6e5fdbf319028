"""`unlearn_adapters.dattri` beside dattri itself, and beside exact inverses where dattri does not converge."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from unlearn_kernels.influence import Projection
from unlearn_kernels.testing import randn, relative_error

pytest.importorskip("dattri")

from dattri.func import hessian, projection

from unlearn_adapters import dattri as ours

N, D = 40, 9
X = randn(N, D, dtype=torch.float64)
W = randn(D, dtype=torch.float64, seed=1)


def loss(w: Tensor, x: Tensor) -> Tensor:
    """Logistic, with a penalty that keeps the Hessian well conditioned."""
    return torch.nn.functional.softplus(x @ w).mean() + 0.05 * w.square().sum()


def exact(v: Tensor, regularization: float = 0.0) -> Tensor:
    H = torch.func.hessian(loss)(W, X) + regularization * torch.eye(D, dtype=W.dtype)
    return torch.linalg.solve(H, v.T).T


QUERIES = randn(4, D, dtype=torch.float64, seed=2)


@pytest.mark.parametrize("regularization", [0.0, 0.3])
@pytest.mark.parametrize("mode", ["rev-rev", "rev-fwd"])
def test_conjugate_gradients(regularization: float, mode: str) -> None:
    options = {"max_iter": 30, "mode": mode, "regularization": regularization}
    for v in (QUERIES, QUERIES[0]):
        x = ours.ihvp_at_x_cg(loss, W, X, tol=1e-12, **options)(v)
        rows = v.view(-1, D)
        assert x.shape == rows.shape
        assert relative_error(x, exact(rows, regularization)) < 1e-10
        # Its forward mode makes zeros of float32 for the arguments that stand still.
        few = options | {"max_iter": D, "mode": "rev-rev"}
        assert relative_error(hessian.ihvp_at_x_cg(loss, W, X, **few)(v), x) < 1e-6
        again = ours.ihvp_cg(loss, 0, 30, 1e-12, mode, regularization)((W, X), v)
        assert torch.equal(again, x)


def test_conjugate_gradients_stop_where_dattri_goes_on_into_nan() -> None:
    """Its `tol` is not read: once the residual is zero it divides zero by zero."""
    v = torch.eye(3, dtype=torch.float64)
    half = lambda w: w.square().sum() / 2  # noqa: E731
    start = torch.zeros(3, dtype=torch.float64)
    assert hessian.ihvp_at_x_cg(half, start)(v).isnan().all()
    assert torch.equal(ours.ihvp_at_x_cg(half, start)(v), v)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_lissa(damping: float) -> None:
    """Batches of everything, in another order each time: the same for both but for rounding."""
    options = {"batch_size": N, "recursion_depth": 150, "damping": damping, "scaling": 1.0}
    dims = {"in_dims": (None, 0)}
    x = ours.ihvp_lissa(loss, **options)((W, X), QUERIES, **dims)
    assert relative_error(x, exact(QUERIES, damping * 1.0)) < 1e-5
    assert relative_error(hessian.ihvp_lissa(loss, **options)((W, X), QUERIES, **dims), x) < 1e-5
    assert relative_error(ours.ihvp_at_x_lissa(loss, W, X, in_dims=(None, 0), **options)(QUERIES), x) < 1e-9
    single = ours.ihvp_lissa(loss, **options | {"num_repeat": 3, "batch_size": 20})(
        (W, X), QUERIES[0], **dims
    )
    assert single.shape == (1, D)
    collated = ours.ihvp_lissa(lambda b: loss(*b), collate_fn=lambda b: (b,), **options)
    assert collated is not None
    with pytest.raises(ArithmeticError, match=r"lissa diverges at scale 0\.1"):
        ours.ihvp_lissa(loss, **options | {"scaling": 0.1})((W, X), QUERIES, **dims)


def test_lissa_at_x_of_dattri_exchanges_two_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes `num_repeat` where `batch_size` is expected, and back."""
    seen: list[int] = []
    sample = hessian._sample_random_batch
    monkeypatch.setattr(
        hessian, "_sample_random_batch", lambda *x, **kw: seen.append(kw["batch_size"]) or sample(*x, **kw)
    )
    options = {"in_dims": (None, 0), "batch_size": 8, "num_repeat": 2, "recursion_depth": 1}
    hessian.ihvp_at_x_lissa(loss, W, X, **options)(QUERIES[0])
    assert seen == [2] * 8
    seen.clear()
    ours.ihvp_at_x_lissa(loss, W, X, **options)(QUERIES[0])
    assert seen[:2] == [8, 8]


def test_arnoldi() -> None:
    """The whole space: both are the inverse. A part of it: the largest eigenvalues'."""
    x = ours.ihvp_at_x_arnoldi(loss, W, X, max_iter=D + 1, mode="rev-rev", regularization=0.1)(QUERIES)
    assert relative_error(x, exact(QUERIES, 0.1)) < 1e-8
    values, vectors = torch.linalg.eigh(torch.func.hessian(loss)(W, X))
    top = vectors[:, -3:]
    few = ours.ihvp_arnoldi(loss, 0, D + 1)((W, X), QUERIES[0])
    assert relative_error(few, exact(QUERIES[:1])) < 1e-8
    found = ours.ihvp_at_x_arnoldi(loss, W, X, max_iter=D + 1, top_k=3)(QUERIES)
    assert relative_error(found, (QUERIES @ top / values[-3:]) @ top.T) < 1e-6


@pytest.mark.parametrize(
    "kind", ["normal", "rademacher", "sjlt", "identity", "random_mask", "grass", "grass_2"]
)
def test_random_projection(kind: str) -> None:
    by = {"w": randn(6, 5, 40), "b": randn(6, 5, seed=1)}
    whole = torch.cat([x.flatten(1) for x in by.values()], 1)
    project = ours.random_project(by, 6, 16, 32, 3, kind)
    y = project(by)
    assert relative_error(project(whole), y) < 1e-6
    names = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt"}
    if kind in names:
        assert relative_error(y, Projection(205, 16, names[kind], 3)(whole.double())) < 1e-6
        assert relative_error(project(by, ensemble_id=1), y) > 0.5
    if kind == "identity":
        assert torch.equal(y, whole)
    else:
        assert y.shape == (6, 16)
    if kind == "random_mask":
        assert all((whole[0] == value).any() for value in y[0])
    if kind not in ("sjlt", "grass", "grass_2"):
        theirs = projection.random_project(by, 6, 16, 32, 3, kind)(by)
        assert y.shape == theirs.shape
        assert y.dtype == theirs.dtype


def test_scale_is_dattris() -> None:
    """Inner products in the mean over seeds, of its projections and of these."""
    x = randn(3, 60, dtype=torch.float64)
    gram = x @ x.T
    for make in (ours.random_project, projection.random_project):
        found = torch.stack([(y := make(x, 3, 64, 32, s, "rademacher")(x)) @ y.T for s in range(60)]).mean(0)
        assert relative_error(found, gram) < 0.1


def test_install_reaches_modules_that_have_the_names_already(monkeypatch: pytest.MonkeyPatch) -> None:
    trak = ModuleType("dattri.algorithm.some")
    trak.random_project = projection.random_project
    monkeypatch.setitem(sys.modules, trak.__name__, trak)
    before = trak.random_project, hessian.ihvp_cg
    ours.install()
    ours.install()
    try:
        assert trak.random_project is ours.random_project
        from dattri.func.hessian import ihvp_cg

        assert ihvp_cg is ours.ihvp_cg
    finally:
        ours.uninstall()
    assert (trak.random_project, hessian.ihvp_cg) == before


def test_refusals() -> None:
    x = randn(2, 8)
    with pytest.raises(hessian.IHVPUsageError, match="mode must be"):
        ours.ihvp_at_x_cg(loss, W, X, mode="fwd")
    for call, message in (
        (lambda: ours.random_project(x, 2, 4, 32, 0, "uniform"), "proj_type must be one of"),
        (lambda: ours.random_project(x, 2, 4, 32, 0, "grass_x"), "grass, grass_N, got 'grass_x'"),
        (lambda: ours.random_project(x, 2, 4, 32, 0, "grass_0"), "grass, grass_N, got 'grass_0'"),
        (lambda: ours.random_project(x, 2, 4, 32, -1), "proj_seed must be between 0 and"),
        (lambda: ours.random_project(x, 2, 4)(randn(2, 9)), "feature must have 8 numbers a row, got 9"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

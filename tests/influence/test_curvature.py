"""Sums of squares and of outer products, and EK-FAC, against dense float64."""

import pytest
import torch

from unlearn_kernels.influence import EKFAC, covariance, squared_gradients, squared_rows
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn, relative_error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (40, 33), (130, 250)])
def test_covariance(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = randn(*shape, dtype=dtype)
    c = covariance(x)
    wide = x.to(c.dtype)
    assert_as_exact_as(
        "c", c, x.double().T @ x.double(), wide.T @ wide, floor=2e-6 if c.dtype != torch.float64 else 1e-14
    )
    assert torch.equal(c, c.T)
    assert torch.equal(covariance(x.T.contiguous().T), c)
    assert torch.equal(covariance(x.view(1, *shape)), c)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("batch", "tokens", "d", "p"), [(1, 1, 1, 1), (5, 3, 17, 9), (3, 300, 33, 210)])
def test_squared_gradients(dtype: torch.dtype, bias: bool, batch: int, tokens: int, d: int, p: int) -> None:
    a, g = randn(batch, tokens, d, dtype=dtype), randn(batch, tokens, p, dtype=dtype, seed=1)

    def plain(a: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        a = torch.cat([a, torch.ones_like(a[..., :1])], 2) if bias else a
        return (g.mT @ a).square().sum(0)

    out = squared_gradients(a, g, bias=bias)
    eager = plain(a.to(out.dtype), g.to(out.dtype))
    floor = 4e-6 if dtype != torch.float64 else 1e-14
    assert_as_exact_as("out", out, plain(a.double(), g.double()), eager, floor=floor)
    mixed = squared_gradients(a.mT.contiguous().mT, g.transpose(0, 1).contiguous().transpose(0, 1), bias=bias)
    assert torch.equal(mixed, out)


def test_nothing_of_samples_is_mixed() -> None:
    """Squares of single gradients: the square of a batch's mean would be zero here."""
    a, g = randn(1, 4, 5).repeat(2, 1, 1), randn(1, 4, 3, seed=1)
    both = squared_gradients(a, torch.cat([g, -g]))
    assert relative_error(both, 2 * squared_gradients(a[:1], g)) < 1e-6
    assert squared_gradients(a[:0], a[:0, :, :3]).abs().max() == 0
    g[0, 0, 0] = torch.nan
    assert squared_gradients(a[:1], g)[0].isnan().all()
    assert not squared_gradients(a[:1], g)[1:].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (130, 1030), (7, 5000)])
def test_squared_rows(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = randn(*shape, dtype=dtype)
    out = squared_rows(x)
    eager = x.to(out.dtype).square().sum(0)
    assert_as_exact_as("out", out, x.double().square().sum(0), eager)
    assert torch.equal(squared_rows(x.T.contiguous().T), out)
    assert torch.equal(squared_rows(x[:0]), torch.zeros(shape[1], dtype=out.dtype))


def test_thread_count_does_not_matter() -> None:
    a, g = randn(4, 30, 250), randn(4, 30, 230, seed=1)
    for call in (lambda: squared_gradients(a, g), lambda: covariance(a), lambda: squared_rows(a.flatten(1))):
        one, two, four = at_threads((1, 2, 4), call)
        assert torch.equal(one, two)
        assert torch.equal(one, four)


def fitted(a: torch.Tensor, g: torch.Tensor, route: str | None = None, bias: bool = False) -> EKFAC:
    e = EKFAC(bias=bias)
    for part in (slice(0, 3), slice(3, None)):
        e.add_covariance(a[part], g[part])
    e.fit_basis()
    for part in (slice(0, 3), slice(3, None)):
        e.add_lambda(a[part], g[part], route=route)
    return e


@pytest.mark.parametrize("route", ["factors", "gradients", None])
@pytest.mark.parametrize("bias", [False, True])
def test_ekfac_against_the_dense_matrix(route: str | None, bias: bool) -> None:
    a, g = randn(9, 5, 7, dtype=torch.float64), randn(9, 5, 4, dtype=torch.float64, seed=1)
    e = fitted(a, g, route, bias)
    a1 = torch.cat([a, torch.ones_like(a[..., :1])], 2) if bias else a
    left, right = (torch.linalg.eigh(x.flatten(0, 1).T @ x.flatten(0, 1))[1] for x in (g, a1))
    grads = g.mT @ a1
    lam = (left.T @ grads @ right).square().mean(0)
    assert relative_error(e.lambda_, lam) < 1e-10
    v = randn(3, *lam.shape, dtype=torch.float64, seed=2)
    basis = torch.kron(left, right)
    dense = basis @ torch.diag(lam.flatten() + 0.3) @ basis.T
    x, residual = e.solve(v, damping=0.3)
    assert relative_error(x.flatten(1), torch.linalg.solve(dense, v.flatten(1).T).T) < 1e-10
    assert residual.max() < 1e-10
    x, _ = e.solve(v)
    dense = basis @ torch.diag(lam.flatten() + 0.1 * lam.mean()) @ basis.T
    assert relative_error(x.flatten(1), torch.linalg.solve(dense, v.flatten(1).T).T) < 1e-10


def test_ekfac_of_small_gradients_and_halves() -> None:
    """Entries of Lambda of 1e-10 are no halves, and neither is the solution."""
    a, g = randn(6, 5, 4), 1e-5 * randn(6, 5, 3, seed=1)
    e, v = fitted(a, g), randn(2, 3, 4, dtype=torch.float16, seed=2)
    x, residual = e.solve(v)
    assert x.dtype == torch.float32
    assert relative_error(x, e.solve(v.double()).x) < 1e-5
    assert residual.max() < 1e-5


def test_ekfac_of_no_gradients() -> None:
    a, g = randn(6, 5, 4), torch.zeros(6, 5, 3)
    e, v = fitted(a, g), torch.stack([torch.zeros(3, 4), torch.ones(3, 4)])
    x, residual = e.solve(v)
    assert not x.any()
    assert residual.tolist() == [0, 1]
    e.add_lambda(a[:0], g[:0])
    assert not e.lambda_.any()
    e.fit_basis()
    e.add_lambda(a[:0], g[:0])
    with pytest.raises(ValueError, match="add_lambda must come before"):
        e.solve(v)
    e.add_lambda(a, torch.full_like(g, torch.inf), route="factors")
    with pytest.raises(ValueError, match="lambda_ must be finite, got a mean of"):
        e.solve(v)


def test_ekfac_routes_by_shape() -> None:
    assert EKFAC.route(64, 256, 256) == "factors"
    assert EKFAC.route(257, 256, 256) == "gradients"
    assert EKFAC.route(1, 8, 100_000) == "factors"
    a, g = randn(6, 4, 12), randn(6, 4, 10, seed=1)
    assert relative_error(fitted(a, g, "factors").lambda_, fitted(a, g, "gradients").lambda_) < 1e-5


def test_errors() -> None:
    e = EKFAC()
    for call, message in (
        (e.fit_basis, "add_covariance must come before fit_basis"),
        (lambda: e.add_lambda(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)), "fit_basis must come before"),
        (lambda: e.lambda_, "add_lambda must come before"),
        (lambda: squared_gradients(torch.zeros(2, 3, 4), torch.zeros(2, 4, 4)), "A and G must agree"),
        (lambda: squared_gradients(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4).double()), "both be float64"),
        (lambda: squared_rows(torch.zeros(3)), r"x must be \(B, D\)"),
        (lambda: covariance(torch.tensor(1)), "x must be"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    e.add_covariance(torch.full((2, 3, 4), torch.nan), randn(2, 3, 2))
    with pytest.raises(ValueError, match="covariances must be finite, that of A is not"):
        e.fit_basis()
    e = fitted(randn(4, 3, 5), randn(4, 3, 2, seed=1))
    with pytest.raises(ValueError, match="route must be None or one of factors, gradients, got 'factor'"):
        e.add_lambda(randn(4, 3, 5), randn(4, 3, 2), route="factor")
    with pytest.raises(ValueError, match=r"v must be \(Q, 2, 5\), got \(2, 5\)"):
        e.solve(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="damping must be positive"):
        e.solve(torch.zeros(1, 2, 5), damping=0.0)

"""Kernels of the products of curvature on the CPU, in the interpreter."""

import math

import pytest
import torch

from unlearn_kernels.reference import curvature as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels import influence_curvature as kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def floor(dtype: torch.dtype, terms: int) -> float | None:
    return math.sqrt(terms + 16) * torch.finfo(dtype).eps if dtype == torch.float64 else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tokens", "d", "p"), [(1, 1, 1, 1), (3, 20, 17, 5), (2, 7, 70, 130)])
def test_squared_gradients(batch: int, tokens: int, d: int, p: int, dtype: torch.dtype) -> None:
    a, g = randn(batch, tokens, d, dtype=dtype), randn(batch, tokens, p, dtype=dtype, seed=1)
    exact = reference.squared_gradients(a.double(), g.double())
    found = kernels.squared_gradients(a, g)
    assert_as_exact_as("y", found, exact, reference.squared_gradients(a, g), floor=floor(dtype, tokens))


def test_squared_gradients_of_two_types() -> None:
    a, g = randn(2, 3, 5), randn(2, 3, 4, dtype=torch.bfloat16)
    exact = reference.squared_gradients(a.double(), g.double())
    assert_as_exact_as("y", kernels.squared_gradients(a, g), exact, reference.squared_gradients(a, g))


def test_squared_gradients_that_are_not_finite() -> None:
    a, g = torch.ones(2, 3, 4), torch.ones(2, 3, 5)
    a[1, 2, 3], g[0, 0, 1] = math.inf, math.nan
    torch.testing.assert_close(
        kernels.squared_gradients(a, g), reference.squared_gradients(a, g), equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (300, 17), (5, 300)])
def test_squared_rows(rows: int, dim: int, dtype: torch.dtype) -> None:
    x = randn(rows, dim, dtype=dtype)
    found = kernels.squared_rows(x)
    exact = reference.squared_rows(x.double())
    assert_as_exact_as("y", found, exact, reference.squared_rows(x), floor=floor(dtype, rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (600, 17), (20, 150)])
def test_covariance(rows: int, dim: int, dtype: torch.dtype) -> None:
    x = randn(rows, dim, dtype=dtype)
    found = kernels.covariance(x)
    assert torch.equal(found, found.T)
    exact = reference.covariance(x.double())
    assert_as_exact_as("y", found, exact, reference.covariance(x), floor=floor(dtype, rows))


def test_strides() -> None:
    x = randn(40, 33)
    apart = x.T.contiguous().T
    assert torch.equal(kernels.squared_rows(apart), kernels.squared_rows(x))
    assert torch.equal(kernels.covariance(apart), kernels.covariance(x))
    a = x.view(4, 10, 33)
    found = kernels.squared_gradients(apart.unflatten(0, (4, 10)), a)
    assert torch.equal(found, kernels.squared_gradients(a, a))


def test_nothing() -> None:
    assert kernels.squared_rows(torch.zeros(0, 3)).tolist() == [0.0] * 3
    assert kernels.covariance(torch.zeros(0, 2)).tolist() == [[0.0] * 2] * 2
    assert kernels.squared_gradients(torch.zeros(0, 3, 2), torch.zeros(0, 3, 1)).tolist() == [[0.0, 0.0]]

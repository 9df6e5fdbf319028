"""The Triton norms of per-sample gradients against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample.linear import linear_sqnorms as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels.per_sample.linear import linear_sqnorms

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = {"direct": 0, "gram": 1, "guarded gram": 3}


def check(a: Tensor, g: Tensor, bias: bool, method: int) -> None:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    result = linear_sqnorms(a, g, bias, method)
    assert result.dtype == wide
    exact = reference(a.double(), g.double(), bias, method)
    assert_as_exact_as("norms", result, exact, reference(a.to(wide), g.to(wide), bias, method))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tile(dtype: torch.dtype, method: int) -> None:
    for bias in (False, True):
        check(randn(2, 5, 7, dtype=dtype), randn(2, 5, 4, dtype=dtype, seed=1), bias, method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(130, 17, 33), (67, 70, 65)])
def test_many_tiles(tokens: int, inputs: int, outputs: int, method: int) -> None:
    check(randn(1, tokens, inputs), randn(1, tokens, outputs, seed=1), True, method)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rank1(dtype: torch.dtype) -> None:
    for bias in (False, True):
        check(randn(3, 1, 40, dtype=dtype), randn(3, 1, 9, dtype=dtype, seed=1), bias, 2)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_mixed_types_and_strides(method: int) -> None:
    a = randn(9, 2, 6, dtype=torch.bfloat16).permute(1, 2, 0)
    check(a, randn(2, 6, 10, seed=1)[..., ::2], True, method)
    check(a[:1].expand(2, -1, -1), randn(2, 1, 5, seed=2).expand(-1, 6, -1), True, method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape: tuple[int, int, int, int], method: int) -> None:
    batch, tokens, inputs, outputs = shape
    check(randn(batch, tokens, inputs), randn(batch, tokens, outputs, seed=1), True, method)


def test_guard_redoes_the_sample_that_cancels() -> None:
    """G = (I - Q Q^T) U + 1e-4 U with Q = orth(A): the Gram sum of the second sample has lost its digits."""
    a, u = randn(2, 64, 24), randn(2, 64, 24, dtype=torch.float64, seed=1)
    q = torch.linalg.qr(a[1].double()).Q
    g = u.clone()
    g[1] = u[1] - q @ (q.T @ u[1]) + 1e-4 * u[1]
    g = g.float()
    exact = reference(a.double(), g.double(), False, 0)
    gram, guarded = (linear_sqnorms(a, g, False, method) for method in (1, 3))
    assert guarded[0] == gram[0]
    assert abs(gram[1] / exact[1] - 1) > 1e-4
    assert abs(guarded[1] / exact[1] - 1) <= 1e-6


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value: float, method: int) -> None:
    a, g = randn(3, 5, 7), randn(3, 5, 4, seed=1)
    clean = linear_sqnorms(a, g, True, method)
    a[1, 2, 3] = value
    result = linear_sqnorms(a, g, True, method)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])


def test_large_half_values_do_not_overflow() -> None:
    a, g = (10 * randn(2, 40, 24, dtype=torch.float64, seed=s) for s in (0, 1))
    for method in METHODS.values():
        check(a.half(), (1000 * g).half(), True, method)

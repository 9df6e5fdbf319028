"""The Triton dots, sums and projections of per-sample gradients against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample import linear as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels.per_sample.linear_dots import linear_dots
from unlearn_kernels.triton_kernels.per_sample.linear_project import linear_sketch, linear_two_sided
from unlearn_kernels.triton_kernels.per_sample.linear_sums import linear_grads, linear_weighted_sum

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = {"tokens": 0, "direct": 1}


def as_exact(actual: Tensor, exact: Tensor, eager: Tensor, terms: Tensor) -> None:
    """A rounding of each term counts as often as the sum of the terms' magnitudes exceeds their sum."""
    condition = terms.double().norm().item() / max(exact.norm().item(), 1e-300)
    floor = 4 * torch.finfo(actual.dtype).eps * max(condition, 1.0)
    assert_as_exact_as("result", actual, exact, eager, floor=floor)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def sides(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    b1, t1, b2, t2, d, p = size
    shapes = (b1, t1, d), (b1, t1, p), (b2, t2, d), (b2, t2, p)
    return tuple(randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))


def check_dots(tensors: tuple[Tensor, ...], summed: bool, bias: bool, method: int) -> None:
    result = linear_dots(*tensors, summed, bias, method)
    exact, eager, terms = (
        reference.linear_dots(*(f(x) for x in tensors), summed, bias, method)
        for f in (Tensor.double, wide, lambda x: wide(x).abs())
    )
    assert result.dtype == eager.dtype
    as_exact(result, exact, eager, terms)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dots(dtype: torch.dtype, method: int, summed: bool) -> None:
    for bias in (False, True):
        check_dots(sides((3, 5, 2, 7, 7, 4), dtype), summed, bias, method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("size", [(1, 70, 2, 17, 19, 9), (2, 9, 1, 5, 70, 65)], ids=str)
def test_dots_of_many_tiles(size: tuple[int, ...], method: int) -> None:
    for summed in (False, True):
        check_dots(sides(size), summed, True, method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dots_of_mixed_types_and_strides(method: int) -> None:
    a1, g1, a2, g2 = sides((2, 6, 3, 5, 9, 4))
    a1 = a1.bfloat16().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    check_dots((a1, g1, a2[:1].expand(3, -1, -1), g2.repeat_interleave(2, -1)[..., ::2]), False, True, method)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_dots_of_nothing(method: int) -> None:
    for size in [
        (0, 2, 3, 2, 4, 5),
        (2, 0, 3, 2, 4, 5),
        (2, 3, 0, 4, 4, 5),
        (2, 3, 2, 4, 0, 5),
        (2, 3, 2, 4, 5, 0),
    ]:
        for summed in (False, True):
            check_dots(sides(size), summed, True, method)


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_what_is_not_finite_stays_in_its_pairs(method: int) -> None:
    a1, g1, a2, g2 = sides((3, 5, 3, 7, 9, 6))
    clean = linear_dots(a1, g1, a2, g2, False, True, method)
    a2[1, 2, 3] = torch.inf
    result = linear_dots(a1, g1, a2, g2, False, True, method)
    assert not result[:, 1].isfinite().any()
    assert torch.equal(result[:, ::2], clean[:, ::2])


def layer(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, d, p = size
    w = randn(batch, dtype=torch.float64 if dtype == torch.float64 else torch.float32, seed=2)
    return randn(batch, tokens, d, dtype=dtype), randn(batch, tokens, p, dtype=dtype, seed=1), w


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 5, 7, 4), (2, 19, 70, 65)], ids=str)
def test_sums(size: tuple[int, ...], dtype: torch.dtype) -> None:
    a, g, w = layer(size, dtype)
    for bias in (False, True):
        results = linear_weighted_sum(a, g, w, bias), linear_grads(a, g, bias)
        for result, formula, weights in zip(
            results, (reference.linear_weighted_sum, reference.linear_grads), ((w,), ()), strict=True
        ):
            exact, eager, terms = (
                formula(*(f(x) for x in (a, g, *weights)), bias)
                for f in (Tensor.double, wide, lambda x: wide(x).abs())
            )
            for tensors in zip(result, exact, eager, terms, strict=True):
                as_exact(*tensors)
    assert linear_weighted_sum(a, g, w, True)[0].dtype == dtype


def test_sums_of_nothing() -> None:
    for size in [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)]:
        a, g, w = layer(size)
        for result, expected in (
            (linear_weighted_sum(a, g, w, True), reference.linear_weighted_sum(a, g, w, True)),
            (linear_grads(a, g, True), reference.linear_grads(a, g, True)),
        ):
            for x, y in zip(result, expected, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 5, 7, 4, 3, 2), (1, 40, 9, 20, 17, 70)], ids=str)
def test_two_sided(size: tuple[int, ...], dtype: torch.dtype) -> None:
    a, g, _ = layer(size[:4], dtype)
    tensors = a, g, randn(size[4], size[3], dtype=dtype, seed=3), randn(size[5], size[2], dtype=dtype, seed=4)
    for bias in (False, True):
        exact, eager, terms = (
            reference.linear_two_sided(*(f(x) for x in tensors), bias)
            for f in (Tensor.double, wide, lambda x: wide(x).abs())
        )
        as_exact(linear_two_sided(*tensors, bias), exact, eager, terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_sketch(bias: bool, dtype: torch.dtype) -> None:
    a, g, _ = layer((2, 3, 37, 60), dtype)
    exact, eager = (reference.linear_sketch(f(a), f(g), bias, 5, 3) for f in (Tensor.double, wide))
    terms = reference.flat_grads(wide(a).abs(), wide(g).abs(), bias).sum(1)
    as_exact(linear_sketch(a, g, bias, 5, 3), exact, eager, terms)


def test_projections_of_nothing() -> None:
    for size in [(0, 3, 4, 5), (2, 0, 4, 5)]:
        a, g, _ = layer(size)
        assert torch.equal(linear_sketch(a, g, True, 6, 0), torch.zeros(size[0], 6))
        assert torch.equal(linear_two_sided(a, g, randn(3, 5), randn(2, 4), True), torch.zeros(size[0], 9))
        only_bias = linear_two_sided(a, g, randn(3, 5), randn(0, 4), True)
        assert torch.equal(only_bias, torch.zeros(size[0], 3))

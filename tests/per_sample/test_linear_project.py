"""Projections of per-sample gradients of a linear layer, against the projected gradients in float64."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import TwoSided, linear
from unlearn_kernels.reference.per_sample.linear import flat_grads, linear_two_sided
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, T, d, p, k_o, k_i): one element; primes below a register tile; token blocks; several tiles of projections.
SIZES = [(1, 1, 1, 1, 1, 1), (3, 5, 7, 11, 3, 2), (2, 401, 33, 20, 17, 5), (2, 30, 300, 310, 270, 290)]
Layer = tuple[Tensor, Tensor]


def layer(batch: int, tokens: int, d: int, p: int, dtype: torch.dtype = torch.float32) -> Layer:
    return randn(batch, tokens, d, dtype=dtype), randn(batch, tokens, p, dtype=dtype, seed=1)


def flattened(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """The gradients as `linear.grads` makes them, flattened, the bias's last."""
    weight, offset = linear.grads(a, g, bias=bias)
    return torch.cat([weight.flatten(1), offset], 1) if bias else weight.flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_two_sided(size: tuple[int, ...], dtype: torch.dtype) -> None:
    a, g = layer(*size[:4], dtype)
    sides = TwoSided(
        randn(size[4], size[3], dtype=dtype, seed=2), randn(size[5], size[2], dtype=dtype, seed=3)
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for bias in (False, True):
        result = linear.project(a, g, sides, bias=bias)
        exact = linear_two_sided(*(x.double() for x in (a, g, *sides)), bias)
        eager = linear_two_sided(*(x.to(wide) for x in (a, g, *sides)), bias)
        # A rounding of each term counts as often as the terms exceed their sum.
        terms = linear_two_sided(*(x.to(wide).abs() for x in (a, g, *sides)), bias)
        floor = 4 * torch.finfo(wide).eps * terms.double().norm().item() / exact.norm().item()
        assert_as_exact_as("projections", result, exact, eager, floor=floor)


def test_two_sided_reference_is_the_definition() -> None:
    a, g = layer(2, 3, 5, 4, torch.float64)
    left, right = randn(3, 4, dtype=torch.float64, seed=2), randn(2, 5, dtype=torch.float64, seed=3)
    expected = torch.einsum("op,btp,btd,id->boi", left, g, a, right).flatten(1)
    offsets = torch.einsum("op,btp->bo", left, g)
    result = linear_two_sided(a, g, left, right, True)
    torch.testing.assert_close(result, torch.cat([expected, offsets], 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sided_strides(dtype: torch.dtype) -> None:
    a, g = layer(3, 20, 9, 12, dtype)
    left, right = randn(5, 12, dtype=dtype, seed=2), randn(4, 9, dtype=dtype, seed=3)
    expected = linear.project(a, g, TwoSided(left, right), bias=True)
    for layout in (lambda x: x.mT.contiguous().mT, lambda x: x.repeat_interleave(2, -1)[..., ::2]):
        sides = TwoSided(layout(left), layout(right))
        assert torch.equal(linear.project(layout(a), layout(g), sides, bias=True), expected)
    shaped = a.unflatten(1, (4, 5)), g.unflatten(1, (4, 5))
    assert torch.equal(linear.project(*shaped, TwoSided(left, right), bias=True), expected)


# (B, T, d, p, k): below a block of signs; rows across blocks; several slabs; several ranges of samples and outputs.
SKETCHES = [
    (2, 3, 5, 7, 4),
    (3, 9, 37, 50, 70),
    (2, 5, 130, 700, 33),
    (35, 2, 70, 90, 530),
    (2, 1, 3000, 40, 9),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SKETCHES, ids=str)
def test_signs_project_as_if_the_gradient_were_there(size: tuple[int, ...], dtype: torch.dtype) -> None:
    *shape, k = size
    a, g = layer(*shape, dtype)
    for bias in (False, True):
        flat = flattened(a, g, bias)
        projection = Projection(flat.shape[1], k, seed=5)
        result, expected = linear.project(a, g, projection, bias=bias), projection(flat)
        assert torch.equal(result, expected), (result - expected).abs().max()


def test_signs_against_the_reference() -> None:
    a, g = layer(3, 9, 37, 50)
    projection = Projection(37 * 50 + 50, 20, seed=1)
    exact = projection.project(flat_grads(a.double(), g.double(), True), backend="reference")
    eager = projection.project(flat_grads(a, g, True), backend="reference")
    assert_as_exact_as("sketches", linear.project(a, g, projection, bias=True), exact, eager)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5)], ids=str)
def test_empty(shape: tuple[int, int, int, int]) -> None:
    a, g = layer(*shape)
    sides = TwoSided(randn(3, 5), randn(2, 4))
    assert torch.equal(linear.project(a, g, sides, bias=True), torch.zeros(shape[0], 9))
    assert torch.equal(linear.project(a, g, Projection(25, 6), bias=True), torch.zeros(shape[0], 6))
    assert linear.project(a, g, TwoSided(randn(0, 5), randn(2, 4))).shape == (shape[0], 0)
    raw = torch.ops.unlearn_kernels.linear_sketch(a[..., :0], g, False, 6, 0)
    assert torch.equal(raw, torch.zeros(shape[0], 6))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value: float) -> None:
    a, g = layer(3, 5, 7, 4)
    for projection in (TwoSided(randn(3, 4), randn(2, 7)), Projection(28, 6)):
        clean = linear.project(a, g, projection)
        broken = a.clone()
        broken[1, 2, 3] = value
        result = linear.project(broken, g, projection)
        assert not result[1].isfinite().any()
        assert torch.equal(result[::2], clean[::2])


def test_same_bits_at_every_thread_count() -> None:
    a, g = layer(5, 70, 90, 130)
    for projection in (TwoSided(randn(20, 130), randn(300, 90)), Projection(91 * 130, 150)):
        first, *others = at_threads((1, 2, 4), lambda p=projection: linear.project(a, g, p, bias=True))
        for other in others:
            assert torch.equal(first, other)


A, G = randn(2, 3, 5), randn(2, 3, 4, seed=1)
ERRORS = {
    "projection must have dim 20, got 24": Projection(24, 3),
    r"left must have shape \(k, 4\), got \(3, 5\)": TwoSided(randn(3, 5), randn(3, 5)),
    r"right must have shape \(k, 5\), got \(2, 3, 5\)": TwoSided(randn(3, 4), randn(2, 3, 5)),
    "left must be a floating-point tensor": TwoSided(torch.ones(3, 4, dtype=torch.int64), randn(3, 5)),
    "A and right must both be float64 or neither": TwoSided(randn(3, 4), randn(3, 5).double()),
    "projection must be a Projection or TwoSided, got int": 5,
}


@pytest.mark.parametrize(("message", "projection"), ERRORS.items(), ids=list(ERRORS))
def test_errors_name_the_argument(message: str, projection: Projection | TwoSided) -> None:
    with pytest.raises(ValueError, match=message):
        linear.project(A, G, projection)


def test_the_raw_operators_guard_memory() -> None:
    raw = torch.ops.unlearn_kernels
    with pytest.raises(RuntimeError, match="left and right must be matrices with 4 and 5 columns"):
        raw.linear_two_sided(A, G, randn(3, 5), randn(3, 5), False)
    with pytest.raises(RuntimeError, match="float64 cannot be mixed"):
        raw.linear_two_sided(A, G, randn(3, 4).double(), randn(3, 5), False)
    with pytest.raises(RuntimeError, match=r"k must be in \[0, 2\^32\], got -1"):
        raw.linear_sketch(A, G, False, -1, 0)

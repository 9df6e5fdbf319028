"""Per-sample gradients of a linear layer and their weighted sums, against autograd in float64."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.per_sample import Gradients, linear
from unlearn_kernels.reference.per_sample.linear import linear_grads, linear_weighted_sum
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# (B, T, d, p): one element; primes below a register tile; several tiles; several blocks of the reduction.
SIZES = [(1, 1, 1, 1), (3, 5, 7, 3), (4, 131, 33, 9), (3, 7, 300, 210), (600, 1, 20, 17)]
LAYOUTS = [
    lambda x: x.mT.contiguous().mT,
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x.repeat_interleave(2, -1)[..., ::2],
]


def layer(
    size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, d, p = size
    w = randn(batch, seed=2)
    return randn(batch, tokens, d, dtype=dtype), randn(batch, tokens, p, dtype=dtype, seed=1), w


def by_autograd(a: Tensor, g: Tensor, w: Tensor) -> Gradients:
    """The gradient of the weighted loss, in float64."""
    module = torch.nn.Linear(a.shape[-1], g.shape[-1], dtype=torch.float64)
    module(a.double()).backward(g.double() * w.double()[:, None, None])
    return Gradients(module.weight.grad, module.bias.grad)


def as_exact_as_its_terms(name: str, result: Tensor, exact: Tensor, eager: Tensor, terms: Tensor) -> None:
    """A rounding of each term counts as often as the sum of the terms' magnitudes exceeds their sum."""
    condition = terms.double().norm().item() / exact.norm().item()
    assert_as_exact_as(name, result, exact, eager, floor=4 * torch.finfo(result.dtype).eps * condition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_weighted_sum(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    a, g, w = layer(size, dtype)
    result, exact = linear.weighted_sum(a, g, w, bias=True), by_autograd(a, g, w)
    assert isinstance(result, Gradients)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    eager = linear_weighted_sum(a.to(wide), g.to(wide), w.to(wide), True)
    terms = linear_weighted_sum(a.abs().to(wide), g.abs().to(wide), w.abs().to(wide), True)
    for name, *tensors in zip(("weight", "bias"), result, exact, eager, terms, strict=True):
        assert tensors[0].dtype == dtype
        as_exact_as_its_terms(name, *tensors)
    assert linear.weighted_sum(a, g, w).bias is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_grads(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    a, g, _ = layer(size, dtype)
    result = linear.grads(a, g, bias=True)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.weight.dtype == result.bias.dtype == wide
    exact, eager = linear_grads(a.double(), g.double(), True), linear_grads(a.to(wide), g.to(wide), True)
    terms = linear_grads(a.abs().to(wide), g.abs().to(wide), True)
    for name, *tensors in zip(("weight", "bias"), result, exact, eager, terms, strict=True):
        as_exact_as_its_terms(name, *tensors)
    assert linear.grads(a, g).bias is None
    first = by_autograd(a[:1], g[:1], torch.ones(1))
    torch.testing.assert_close(linear_grads(a.double(), g.double(), True)[0][0], first.weight)


def test_mixed_types_are_summed_in_float32_and_rounded_to_that_of_g() -> None:
    a, g, w = layer((3, 40, 33, 20))
    result = linear.weighted_sum(a, g.bfloat16(), w)
    assert result.weight.dtype == torch.bfloat16
    assert torch.equal(result.weight, linear.weighted_sum(a, g.bfloat16().float(), w).weight.bfloat16())


def test_weights_are_not_rounded_to_half() -> None:
    """A clipping factor in bf16 is off by up to 2e-3, and the clipped sum with it."""
    a, g, _ = layer((2, 64, 33, 20), torch.bfloat16)
    w = torch.tensor([0.123456, 0.0345678])
    result = linear.weighted_sum(a, g.float(), w).weight
    exact = by_autograd(a, g, w).weight
    assert ((result - exact).norm() / exact.norm()).item() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    a, g, w = layer((5, 20, 33, 12), dtype)
    sums, each = linear.weighted_sum(a, g, w, bias=True), linear.grads(a, g, bias=True)
    for layout in LAYOUTS:
        for result, expected in (
            (linear.weighted_sum(layout(a), layout(g), w.repeat_interleave(2)[::2], bias=True), sums),
            (linear.grads(layout(a), layout(g), bias=True), each),
        ):
            assert all(torch.equal(x, y) for x, y in zip(result, expected, strict=True))
    wide = a[:1].expand(5, -1, -1)
    assert torch.equal(linear.weighted_sum(wide, g, w)[0], linear.weighted_sum(wide.contiguous(), g, w)[0])


def test_dimensions_between_fold_into_tokens() -> None:
    a, g, w = layer((3, 12, 7, 5))
    shaped = a.unflatten(1, (2, 3, 2)), g.unflatten(1, (2, 3, 2))
    assert torch.equal(linear.weighted_sum(*shaped, w).weight, linear.weighted_sum(a, g, w).weight)
    assert torch.equal(linear.grads(*shaped).weight, linear.grads(a, g).weight)
    assert torch.equal(linear.grads(a[:, 0], g[:, 0]).weight, linear.grads(a[:, :1], g[:, :1]).weight)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)], ids=str)
def test_empty(shape: tuple[int, int, int, int]) -> None:
    a, g, w = layer(shape)
    for result, expected in (
        (linear.weighted_sum(a, g, w, bias=True), linear_weighted_sum(a, g, w, True)),
        (linear.grads(a, g, bias=True), linear_grads(a, g, True)),
    ):
        for x, y in zip(result, expected, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_passes_through(value: float) -> None:
    a, g, w = layer((3, 5, 7, 4))
    a[1, 2, 3] = value
    expected, result = linear_grads(a, g, True), linear.grads(a, g, bias=True)
    assert torch.equal(result.weight.isfinite(), expected[0].isfinite())
    total = linear.weighted_sum(a, g, w, bias=True)
    assert torch.equal(total.weight.isfinite(), expected[0].isfinite().all(0))
    assert total.bias.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_at_every_thread_count(dtype: torch.dtype) -> None:
    a, g, w = layer((6, 61, 210, 400), dtype)
    for call in (lambda: linear.weighted_sum(a, g, w, bias=True), lambda: linear.grads(a, g, bias=True)):
        first, *others = at_threads((1, 2, 4), call)
        for other in others:
            assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_a_transposed_weight_takes_the_transpose() -> None:
    """Hugging Face's Conv1D computes x W + b with W (d, p)."""
    a, g, w = layer((3, 6, 7, 5))
    weight = randn(7, 5, seed=3).requires_grad_()
    offset = torch.zeros(5, requires_grad=True)
    outputs = torch.addmm(offset, a.flatten(0, 1), weight)
    of_weight, of_offset = torch.autograd.grad(
        outputs, (weight, offset), (g * w[:, None, None]).flatten(0, 1)
    )
    result = linear.weighted_sum(a, g, w, bias=True)
    torch.testing.assert_close(result.weight.T, of_weight)
    torch.testing.assert_close(result.bias, of_offset)


A, G = randn(2, 3, 5), randn(2, 3, 4, seed=1)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        linear.weighted_sum(A, G, torch.ones(3))
    with pytest.raises(ValueError, match="w must be a tensor of real numbers"):
        linear.weighted_sum(A, G, torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="w must be on cpu, got meta"):
        linear.weighted_sum(A, G, torch.ones(2, device="meta"))
    for call in (linear.grads, lambda a, g: linear.weighted_sum(a, g, torch.ones(2))):
        with pytest.raises(ValueError, match="A and G must agree in all dimensions but the last"):
            call(A, G[:, :2])
    raw = torch.ops.unlearn_kernels
    for w in (torch.ones(3), torch.ones(4)[::2], torch.ones(2).double()):
        with pytest.raises(RuntimeError, match="linear_weighted_sum: w must be"):
            raw.linear_weighted_sum(A, G, w, True)
    with pytest.raises(RuntimeError, match="agree in batch and tokens"):
        raw.linear_grads(A, G[:, :2], True)


def test_takes_no_part_in_autograd() -> None:
    a, g, w = A.clone().requires_grad_(), G.clone().requires_grad_(), torch.ones(2).requires_grad_()
    for result in (*linear.weighted_sum(a, g, w, bias=True), *linear.grads(a, g, bias=True)):
        assert not result.requires_grad

"""Squared norms of per-sample gradients of a linear layer, against autograd in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as apply_linear

from unlearn_kernels.per_sample import linear
from unlearn_kernels.reference.per_sample.linear import linear_sqnorms as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = ["direct", "gram", "auto"]
# (T, d, p): one element; primes below a register tile; one past a vector; across several cache blocks.
SIZES = [(1, 1, 1), (5, 7, 3), (17, 33, 9), (131, 67, 257), (300, 5, 130), (2, 400, 3)]


def by_autograd(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """The definition, in float64: one backward a sample."""
    norms = []
    for x, upstream in zip(a.double(), g.double(), strict=True):
        weight = torch.zeros(g.shape[-1], a.shape[-1], dtype=torch.float64, requires_grad=True)
        offset = torch.zeros(g.shape[-1], dtype=torch.float64, requires_grad=True)
        grads = torch.autograd.grad(apply_linear(x, weight, offset), (weight, offset), upstream)
        norms.append(grads[0].square().sum() + bias * grads[1].square().sum())
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


def pair(batch: int, size: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    tokens, inputs, outputs = size
    return randn(batch, tokens, inputs, dtype=dtype), randn(batch, tokens, outputs, dtype=dtype, seed=1)


def in_eager(a: Tensor, g: Tensor, bias: bool, gram: bool) -> Tensor:
    """The method's formula in PyTorch."""
    return ((a @ a.mT + bias) * (g @ g.mT)).sum(dim=(1, 2)) if gram else reference(a, g, bias, 0)


def condition(a: Tensor, g: Tensor, bias: bool, gram: bool) -> float:
    """How many times the terms of the Gram sum exceed their sum: what a rounding of each is multiplied by."""
    terms = (a.double() @ a.double().mT + bias) * (g.double() @ g.double().mT)
    total = terms.sum().item()
    return terms.abs().sum().item() / total if gram and total else 1.0


def check(a: Tensor, g: Tensor, bias: bool = True, method: str = "auto") -> None:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    result = linear.sqnorms(a, g, bias=bias, method=method)
    assert result.dtype == wide
    a, g = (x.flatten(1, -2) if x.dim() > 2 else x[:, None] for x in (a, g))
    gram = method == "gram" or (method == "auto" and linear.explain(a, g).method == "gram")
    exact, eager = by_autograd(a, g, bias), in_eager(a.to(wide), g.to(wide), bias, gram)
    floor = 4 * torch.finfo(wide).eps * condition(a, g, bias, gram)
    assert_as_exact_as(f"norms by {method}", result, exact, eager, floor=floor)


@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_autograd(bias: bool) -> None:
    a, g = pair(3, (5, 7, 4), torch.float64)
    torch.testing.assert_close(reference(a, g, bias, 0), by_autograd(a, g, bias), rtol=1e-13, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size: tuple[int, int, int], dtype: torch.dtype, method: str) -> None:
    for bias in (False, True):
        check(*pair(2, size, dtype), bias, method)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_token(dtype: torch.dtype) -> None:
    a, g = pair(5, (1, 33, 70), dtype)
    check(a, g, method="rank1")
    assert torch.equal(linear.sqnorms(a, g), linear.sqnorms(a, g, method="rank1"))
    assert torch.equal(linear.sqnorms(a[:, 0], g[:, 0]), linear.sqnorms(a, g))


def test_dimensions_between_fold_into_tokens() -> None:
    a, g = randn(3, 4, 5, 6), randn(3, 4, 5, 7, seed=1)
    check(a, g)
    folded = linear.sqnorms(a.flatten(1, 2), g.flatten(1, 2), bias=True)
    assert torch.equal(linear.sqnorms(a, g, bias=True), folded)
    check(a[:, 0, 0], g[:, 0, 0])
    check(a.movedim(0, 2), g.movedim(0, 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, method: str) -> None:
    a, g = pair(3, (20, 9, 12), dtype)
    expected = linear.sqnorms(a, g, bias=True, method=method)
    layouts = [
        (a.mT.contiguous().mT, g.transpose(0, 1).contiguous().transpose(0, 1)),
        (a.repeat_interleave(2, -1)[..., ::2], g.repeat_interleave(3, 1)[:, ::3]),
        (a.flip(0), g.flip(0)),
    ]
    for x, y in layouts[:2]:
        assert torch.equal(linear.sqnorms(x, y, bias=True, method=method), expected)
    assert torch.equal(linear.sqnorms(*layouts[2], bias=True, method=method), expected.flip(0))
    check(a[:1].expand(3, -1, -1), g[:, :1].expand(-1, 20, -1), method=method)
    check(a[..., :1].expand(-1, -1, 9), g, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0, 0, 0, 0)], ids=str
)
def test_empty(shape: tuple[int, int, int, int], method: str) -> None:
    check(*pair(shape[0], shape[1:]), method=method)


def test_mixed_half_types() -> None:
    a, g = randn(2, 9, 7, dtype=torch.bfloat16), randn(2, 9, 5, seed=1)
    for method in METHODS:
        check(a, g, method=method)
        check(a, g.half(), method=method)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_stays_in_its_sample(method: str, value: float) -> None:
    a, g = pair(3, (33, 20, 9))
    clean = linear.sqnorms(a, g, bias=True, method=method)
    a[1, 32, 19] = value
    result = linear.sqnorms(a, g, bias=True, method=method)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])


def cancelling(batch: int, tokens: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """G = (I - Q Q^T) U + 1e-4 U with Q = orth(A): |A^T G| is 1e-4 of |A| |G|."""
    a, u = randn(batch, tokens, inputs), randn(batch, tokens, outputs, dtype=torch.float64, seed=1)
    q = torch.linalg.qr(a.double()).Q
    return a, (u - q @ (q.mT @ u) + 1e-4 * u).float()


@pytest.mark.parametrize(("size", "chosen"), [((16, 512, 256, 256), "direct"), ((2, 150, 100, 2500), "gram")])
def test_auto_keeps_its_digits_where_the_gram_form_cancels(size: tuple[int, int, int], chosen: str) -> None:
    a, g = cancelling(*size)
    assert linear.explain(a, g).method == chosen
    exact = by_autograd(a, g, False)

    def error(norms: Tensor) -> float:
        """In the root mean square: a norm errs by its gradient's error along the gradient, by chance almost none."""
        return ((norms - exact) / exact).square().mean().sqrt().item()

    in_eager = error(reference(a, g, False, 0))
    assert error(linear.sqnorms(a, g, method="gram")) > 1e-3
    assert error(linear.sqnorms(a, g)) <= (1e-6 if chosen == "gram" else 2 * in_eager)
    assert error(linear.sqnorms(a, g, method="direct")) <= 2 * in_eager


def test_auto_redoes_only_the_sample_that_cancels() -> None:
    a, g = cancelling(2, 150, 100, 2500)
    g[0] = randn(150, 2500, seed=2)
    auto, gram = linear.sqnorms(a, g), linear.sqnorms(a, g, method="gram")
    assert auto[0] == gram[0]
    assert auto[1] != gram[1]


@pytest.mark.parametrize("method", METHODS)
def test_fp16_of_loss_scale_size_is_exact_and_finite(method: str) -> None:
    a, g = (10 * randn(4, 64, size, dtype=torch.float64, seed=size) for size in (96, 80))
    for scale in (1.0, 1000.0):
        a_half, g_half = a.half(), (scale * g).half()
        result = linear.sqnorms(a_half, g_half, bias=True, method=method)
        exact = by_autograd(a_half, g_half, True)
        assert result.isfinite().all()
        assert ((result - exact) / exact).abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_same_bits_at_every_thread_count(method: str) -> None:
    for size in ((1, 90, 80), (65, 90, 80), (300, 70, 260)):
        if method == "gram" or size[0] > 1:
            a, g = pair(7, size)
            results = at_threads((1, 2, 4, 3), lambda: linear.sqnorms(a, g, bias=True, method=method))  # noqa: B023
            assert all(torch.equal(results[0], other) for other in results)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    a, g = pair(5, (40, 30, 20))
    for method in METHODS:
        whole = linear.sqnorms(a, g, bias=True, method=method)
        parts = [linear.sqnorms(a[i : i + 1], g[i : i + 1], bias=True, method=method) for i in range(5)]
        assert torch.equal(whole, torch.cat(parts))


def test_scaling_and_permutation() -> None:
    a, g = pair(4, (20, 12, 9))
    norms, order = linear.sqnorms(a, g, bias=True), torch.tensor([2, 0, 3, 1])
    assert torch.equal(linear.sqnorms(a, 4 * g, bias=True), 16 * norms)
    assert torch.equal(linear.sqnorms(a[order], g[order], bias=True), norms[order])
    assert (norms >= linear.sqnorms(a, g)).all()


def test_offsets_beyond_two_to_the_31() -> None:
    """A stride of more than 2^31 elements, over storage whose untouched pages take no memory."""
    a = torch.empty_strided((2, 1, 3), (2**31 + 8, 3, 1), dtype=torch.float16)
    a[0], a[1] = 2.0, 3.0
    g = torch.ones(2, 1, 5)
    for method in ("rank1", "direct", "gram"):
        assert linear.sqnorms(a, g, method=method).tolist() == [60.0, 135.0]

"""Squared norms of per-sample gradients of a convolution, against autograd in float64."""

import pytest
import torch
from torch import Tensor

from tests.per_sample.convolutions import LAYERS, Layer, by_autograd, channels_last, layer
from unlearn_kernels.per_sample import conv, linear
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = ["direct", "gram", "auto"]
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_METHOD = pytest.mark.parametrize("method", METHODS)


def exact_norms(layer: Layer, a: Tensor, g: Tensor, bias: bool) -> Tensor:
    weight, offset = by_autograd(layer, a, g)
    return weight.flatten(1).square().sum(1) + bias * offset.square().sum(1)


def check(layer: Layer, a: Tensor, g: Tensor, method: str = "auto", *, bias: bool = True) -> Tensor:
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    result = conv.sqnorms(a, g, bias=bias, method=method, **layer.arguments)
    assert result.dtype == wide
    eager = conv.sqnorms(a.to(wide), g.to(wide), bias=bias, backend="reference", **layer.arguments)
    # Terms of a Gram sum, as many as pairs of positions, round before they cancel.
    floor = 16 * torch.finfo(wide).eps if method != "direct" else None
    assert_as_exact_as(f"norms by {method}", result, exact_norms(layer, a, g, bias), eager, floor=floor)
    return result


@EACH_LAYER
@pytest.mark.parametrize("bias", [False, True])
def test_reference_is_autograd(name: str, bias: bool) -> None:
    a, g = LAYERS[name].pair(dtype=torch.float64)
    norms = conv.sqnorms(a, g, bias=bias, backend="reference", **LAYERS[name].arguments)
    torch.testing.assert_close(norms, exact_norms(LAYERS[name], a, g, bias), rtol=1e-12, atol=0)


@EACH_METHOD
@EACH_LAYER
def test_layers_and_dtypes(name: str, method: str) -> None:
    for dtype in DTYPES:
        check(LAYERS[name], *LAYERS[name].pair(2, dtype), method)
    check(LAYERS[name], *LAYERS[name].pair(2), method, bias=False)


@EACH_METHOD
@EACH_LAYER
def test_strides(name: str, method: str) -> None:
    """Channels last, gaps, reversed dimensions, and expanded batches and gradients."""
    spec = LAYERS[name]
    a, g = spec.pair()
    expected = check(spec, a, g, method)
    reverse = tuple(range(a.dim()))[::-1]
    layouts = (
        channels_last,
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.permute(reverse).contiguous().permute(reverse),
    )
    for layout in layouts:
        norms = conv.sqnorms(layout(a), layout(g), bias=True, method=method, **spec.arguments)
        torch.testing.assert_close(norms, expected, rtol=2e-6, atol=0)
    check(spec, channels_last(a)[:1].expand_as(a), g[:, :, :1].expand_as(g), method)


@EACH_DTYPE
@EACH_METHOD
def test_empty(method: str, dtype: torch.dtype) -> None:
    for shape, out in (
        ((0, 4, 5, 6), (0, 3, 3, 4)),
        ((2, 0, 5, 6), (2, 3, 3, 4)),
        ((2, 4, 5, 6), (2, 0, 3, 4)),
    ):
        a, g = randn(*shape, dtype=dtype), randn(*out, dtype=dtype, seed=1)
        norms = conv.sqnorms(a, g, kernel_size=3, method=method)
        assert torch.equal(norms, torch.zeros(shape[0], dtype=norms.dtype))
    no_positions = conv.sqnorms(
        randn(2, 4, 2, 6, dtype=dtype),
        randn(2, 3, 0, 4, dtype=dtype),
        kernel_size=3,
        method=method,
        bias=True,
    )
    assert torch.equal(no_positions, torch.zeros_like(no_positions))


@EACH_METHOD
def test_a_pointwise_kernel_is_a_linear_layer(method: str) -> None:
    a, g = randn(3, 40, 6, 7), randn(3, 30, 6, 7, seed=1)
    tokens = a.flatten(2).mT, g.flatten(2).mT
    norms = linear.sqnorms(*tokens, bias=True, method=method)
    torch.testing.assert_close(
        conv.sqnorms(a, g, kernel_size=1, bias=True, method=method), norms, rtol=1e-6, atol=0
    )


@EACH_METHOD
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["2d past a block", "2d everything", "depthwise"])
def test_what_is_not_finite_stays_in_its_sample(name: str, value: float, method: str) -> None:
    a, g = LAYERS[name].pair()
    arguments = {"bias": True, "method": method, **LAYERS[name].arguments}
    clean = conv.sqnorms(a, g, **arguments)
    a[1, 0, -2, -2] = value
    result = conv.sqnorms(a, g, **arguments)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])


@EACH_METHOD
def test_infinite_neighbours_of_the_padding(method: str) -> None:
    """A zero from the padding is not multiplied by what the input holds beside it."""
    a, g = torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    a[0, 0, 2, 2], g[0, 0, 0, 0] = torch.inf, 1.0
    norms = conv.sqnorms(a, g, kernel_size=2, padding="same", method="direct")
    assert norms.isnan().all()  # 0 * inf of the definition
    a[0, 0, 2, 2], a[0, 0, 0, 0] = 1.0, torch.inf
    assert conv.sqnorms(a, g, kernel_size=2, padding="same", method="direct").isinf().all()


def test_auto_keeps_its_digits_where_the_gram_form_cancels() -> None:
    """G = (I - Q Q^T) U + 1e-4 U with Q = orth([A, 1]), for a pointwise kernel and its bias."""
    a, u = randn(2, 100, 150), randn(2, 150, 2500, dtype=torch.float64, seed=1)
    q = torch.linalg.qr(torch.cat([a.double(), torch.ones(2, 1, 150)], 1).mT).Q
    g = (u - q @ (q.mT @ u) + 1e-4 * u).float().mT
    spec = layer(100, 2500, (150,), 1)
    assert conv.explain(a, g, kernel_size=1).method == "gram"
    exact = exact_norms(spec, a, g, True)

    def error(**how: object) -> float:
        norms = conv.sqnorms(a, g, bias=True, kernel_size=1, **how)
        return ((norms - exact) / exact).abs().max().item()

    assert error(method="gram") > 1e-4
    assert error() <= 1e-6


def test_explain_follows_the_cost() -> None:
    def chosen(channels: int, outputs: int, size: int) -> conv.Choice:
        a, g = torch.empty(1, channels, size, size), torch.empty(1, outputs, size, size)
        return conv.explain(a, g, kernel_size=3, padding=1)

    assert chosen(64, 64, 32).method == "direct"
    assert chosen(512, 512, 7).method == "gram"
    assert chosen(8, 8, 1).method == "rank1"
    assert chosen(64, 64, 32).direct == 1024 * 64 * 64 * 9


@EACH_METHOD
def test_fp16_of_loss_scale_size_is_exact_and_finite(method: str) -> None:
    a, g = (10 * x for x in LAYERS["2d past a block"].pair(2, torch.float64))
    a, g = a.half(), (1000 * g).half()
    result = conv.sqnorms(a, g, bias=True, method=method, **LAYERS["2d past a block"].arguments)
    exact = exact_norms(LAYERS["2d past a block"], a, g, True)
    assert ((result - exact) / exact).abs().max() <= 1e-5


@EACH_METHOD
@pytest.mark.parametrize("name", ["2d past a block", "2d many tiles", "many groups", "depthwise"])
def test_same_bits_at_every_thread_count_and_batch(name: str, method: str) -> None:
    a, g = LAYERS[name].pair(5)
    arguments = {"bias": True, "method": method, **LAYERS[name].arguments}
    results = at_threads((1, 2, 4, 3), lambda: conv.sqnorms(a, g, **arguments))
    assert all(torch.equal(results[0], other) for other in results)
    parts = [conv.sqnorms(a[i : i + 1], g[i : i + 1], **arguments) for i in range(5)]
    assert torch.equal(results[0], torch.cat(parts))


def test_offsets_beyond_two_to_the_31() -> None:
    """A stride of more than 2^31 elements, over storage whose untouched pages take no memory."""
    a = torch.empty_strided((2, 1, 3, 3), (2**31 + 8, 9, 3, 1), dtype=torch.float16)
    a[0], a[1] = 2.0, 3.0
    g = torch.ones(2, 5, 1, 1)
    for method in ("rank1", "direct", "gram"):
        assert conv.sqnorms(a, g, kernel_size=3, method=method).tolist() == [180.0, 405.0]

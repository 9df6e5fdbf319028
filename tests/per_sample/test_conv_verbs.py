"""Dot products, gradients, weighted sums and projections of convolutions, against autograd in float64."""

import pytest
import torch
from torch import Tensor

from tests.per_sample.convolutions import LAYERS, by_autograd, channels_last, flat
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import conv
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)
SOME_LAYERS = pytest.mark.parametrize(
    "name", ["2d past a block", "2d many tiles", "depthwise", "many groups"]
)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@EACH_LAYER
@pytest.mark.parametrize("summed", [False, True], ids=["pairs", "summed"])
def test_dots(name: str, summed: bool) -> None:
    spec = LAYERS[name]
    for dtype in DTYPES:
        first, second = spec.pair(3, dtype), spec.pair(4, dtype, seed=5)
        rows, columns = flat(by_autograd(spec, *first)), flat(by_autograd(spec, *second))
        exact = rows @ columns.sum(0) if summed else rows @ columns.T
        arguments = {"summed": summed, "bias": True, **spec.arguments}
        eager = conv.dots(*map(wide, (*first, *second)), backend="reference", **arguments)
        # Products of independent gradients cancel: errors are judged against the gradients' size.
        floor = 4 * torch.finfo(eager.dtype).eps * (rows.norm() * columns.norm() / exact.norm()).item()
        assert_as_exact_as("dots", conv.dots(*first, *second, **arguments), exact, eager, floor=floor)


@pytest.mark.parametrize("summed", [False, True], ids=["pairs", "summed"])
def test_dots_of_a_validation_batch_are_not_products_of_its_sums(summed: bool) -> None:
    """Summing A and G over the second batch before they are multiplied gives another number."""
    spec = LAYERS["2d past a block"]
    first, (a, g) = spec.pair(3), spec.pair(4, seed=5)
    wrong = flat(by_autograd(spec, *first)) @ flat(by_autograd(spec, a.sum(0, True), g.sum(0, True))).T
    right = flat(by_autograd(spec, *first)) @ flat(by_autograd(spec, a, g)).sum(0)
    dots = conv.dots(*first, a, g, summed=summed, bias=True, **spec.arguments)
    dots = dots if summed else dots.sum(1)
    torch.testing.assert_close(dots.double(), right, rtol=1e-5, atol=1e-3)
    assert (wrong[:, 0] - right).norm() > 0.5 * right.norm()


def test_dots_with_itself_holds_the_norms() -> None:
    for name in ("2d everything", "2d past a block", "depthwise"):
        spec = LAYERS[name]
        a, g = spec.pair(4)
        gramian = conv.dots(a, g, a, g, bias=True, **spec.arguments)
        assert torch.equal(gramian, gramian.T)
        norms = conv.sqnorms(a, g, bias=True, method="direct", **spec.arguments)
        torch.testing.assert_close(gramian.diagonal(), norms, rtol=1e-6, atol=0)


def test_dots_of_different_spatial_sizes_and_layouts() -> None:
    arguments = {"kernel_size": 3, "padding": 1, "groups": 2}
    first = randn(2, 4, 9, 8), randn(2, 6, 9, 8, seed=1)
    second = randn(3, 4, 5, 20, seed=2), randn(3, 6, 5, 20, seed=3)
    doubled = (x.double() for x in (*first, *second))
    exact = conv.dots(*doubled, backend="reference", **arguments)
    last, last_too = tuple(map(channels_last, first)), tuple(map(channels_last, second))
    for x, y in ((first, second), (last, second), (first, last_too), (last, last_too)):
        torch.testing.assert_close(conv.dots(*x, *y, **arguments).double(), exact, rtol=1e-4, atol=1e-3)


def test_dots_of_more_gradients_than_tiles_have_room_for() -> None:
    spec = LAYERS["2d many tiles"]
    first, second = spec.pair(70), spec.pair(60, seed=5)
    dots = conv.dots(*first, *second, **spec.arguments)
    for i, j in ((0, 0), (69, 59), (33, 7)):
        pair = conv.dots(*(x[i : i + 1] for x in first), *(x[j : j + 1] for x in second), **spec.arguments)
        torch.testing.assert_close(dots[i, j], pair[0, 0], rtol=1e-3, atol=1e-2)


@EACH_LAYER
def test_grads_and_weighted_sum(name: str) -> None:
    spec, w = LAYERS[name], torch.tensor([0.5, -2.0, 1.0])
    for dtype in DTYPES:
        a, g = spec.pair(3, dtype)
        exact = by_autograd(spec, a, g)
        sums = tuple(torch.tensordot(w.double(), x, 1) for x in exact)
        for layout in (lambda x: x, channels_last):
            found = conv.grads(layout(a), layout(g), bias=True, **spec.arguments)
            eager = conv.grads(wide(a), wide(g), bias=True, backend="reference", **spec.arguments)
            summed = conv.weighted_sum(layout(a), layout(g), w, bias=True, **spec.arguments)
            eager_sum = conv.weighted_sum(
                wide(a), wide(g), w, bias=True, backend="reference", **spec.arguments
            )
            for part in (0, 1):
                assert_as_exact_as("gradients", found[part], exact[part], eager[part])
                assert summed[part].dtype == dtype
                assert_as_exact_as("sum", summed[part], sums[part], eager_sum[part].to(dtype))
    assert conv.grads(*spec.pair(), **spec.arguments).bias is None
    assert conv.weighted_sum(*spec.pair(), w, **spec.arguments).bias is None


def test_verbs_of_an_empty_batch() -> None:
    a, g = torch.empty(0, 4, 5, 6), torch.empty(0, 3, 3, 4)
    assert conv.dots(a, g, a, g, kernel_size=3, bias=True).shape == (0, 0)
    full = randn(2, 4, 5, 6), randn(2, 3, 3, 4, seed=1)
    assert torch.equal(conv.dots(*full, a, g, kernel_size=3, summed=True, bias=True), torch.zeros(2))
    assert conv.dots(*full, a, g, kernel_size=3).shape == (2, 0)
    assert conv.grads(a, g, kernel_size=3, bias=True).weight.shape == (0, 3, 4, 3, 3)
    weight, bias = conv.weighted_sum(a, g, torch.empty(0), kernel_size=3, bias=True)
    assert torch.equal(weight, torch.zeros(3, 4, 3, 3))
    assert torch.equal(bias, torch.zeros(3))
    assert conv.project(a, g, Projection(108, 7), kernel_size=3).shape == (0, 7)


def test_weighted_sum_of_unit_weights_after_clipping() -> None:
    spec = LAYERS["2d everything"]
    a, g = spec.pair(5)
    factors = conv.sqnorms(a, g, **spec.arguments).rsqrt()
    total, _ = conv.weighted_sum(a, g, factors, **spec.arguments)
    clipped = conv.grads(a, g * factors[:, None, None, None], **spec.arguments).weight
    torch.testing.assert_close(clipped.flatten(1).norm(dim=1), torch.ones(5))
    torch.testing.assert_close(total, clipped.sum(0))


def test_projection_of_flattened_gradients() -> None:
    spec = LAYERS["2d everything"]
    a, g = spec.pair()
    weight, offset = conv.grads(a, g, bias=True, **spec.arguments)
    plain = Projection(weight[0].numel(), 30, seed=3)
    assert torch.equal(conv.project(a, g, plain, **spec.arguments), plain(weight.flatten(1)))
    both = Projection(plain.dim + offset.shape[1], 30, seed=3)
    rows = torch.cat([weight.flatten(1), offset], 1)
    assert torch.equal(conv.project(a, g, both, bias=True, **spec.arguments), both(rows))


def test_projection_from_both_sides() -> None:
    spec = LAYERS["2d everything"]
    a, g = spec.pair()
    weight = by_autograd(spec, a, g)[0].flatten(2)
    sides = TwoSided(randn(5, weight.shape[1], seed=8), randn(6, weight.shape[2], seed=9))
    exact = (sides.left.double() @ weight @ sides.right.double().T).flatten(1)
    torch.testing.assert_close(
        conv.project(a, g, sides, **spec.arguments).double(), exact, rtol=1e-4, atol=1e-4
    )


def test_projection_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = LAYERS["2d"]
    a, g = spec.pair(5)
    projection = Projection(8 * 12 * 9, 20)
    whole = conv.project(a, g, projection, **spec.arguments)
    monkeypatch.setattr(conv, "_PROJECTED_BYTES", 8 * 12 * 9 * 4 * 2)
    assert torch.equal(conv.project(a, g, projection, **spec.arguments), whole)


@SOME_LAYERS
def test_same_bits_at_every_thread_count(name: str) -> None:
    spec = LAYERS[name]
    first, second, w = spec.pair(5), spec.pair(3, seed=5), randn(5, seed=9)

    def everything() -> Tensor:
        found = [conv.dots(*first, *second, bias=True, summed=s, **spec.arguments) for s in (False, True)]
        found += conv.grads(*first, bias=True, **spec.arguments)
        found += conv.weighted_sum(*first, w, bias=True, **spec.arguments)
        return torch.cat([x.flatten() for x in found])

    results = at_threads((1, 2, 4, 3), everything)
    assert all(torch.equal(results[0], other) for other in results)


def test_what_is_not_finite_stays_in_its_sample() -> None:
    spec = LAYERS["2d past a block"]
    first, second = spec.pair(3), spec.pair(2, seed=5)
    clean = conv.dots(*first, *second, **spec.arguments)
    first[0][1, 0, 5, 5] = torch.inf
    dots = conv.dots(*first, *second, **spec.arguments)
    assert not dots[1].isfinite().any()
    assert torch.equal(dots[::2], clean[::2])

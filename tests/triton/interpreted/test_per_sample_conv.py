"""The Triton kernels of convolutions against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample import conv as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels.per_sample import conv as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Channels, input shape, outputs, output shape, window, groups.
LAYERS = {
    "2d": (3, (1, 5, 6), 4, (1, 5, 6), [1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1], 1),
    "everything": (4, (3, 6, 5), 6, (2, 3, 5), [2, 3, 2, 1, 2, 1, 0, 1, 1, 1, 1, 2], 2),
    "depthwise": (5, (1, 1, 20), 5, (1, 1, 10), [1, 1, 3, 1, 1, 2, 0, 0, 1, 1, 1, 1], 5),
    "many tiles": (8, (1, 4, 4), 70, (1, 4, 4), [1, 3, 3, 1, 1, 1, 0, 1, 1, 1, 1, 1], 1),
}
EACH_LAYER = pytest.mark.parametrize("name", LAYERS)


def maps(name: str, batch: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    channels, shape, outputs, out, *_ = LAYERS[name]
    a = randn(batch, channels, *shape, dtype=dtype, seed=seed)
    return a, randn(batch, outputs, *out, dtype=dtype, seed=seed + 1)


def check(name: str, verb: str, tensors: tuple[Tensor | None, ...], *last: bool | int) -> None:
    *_, window, groups = LAYERS[name]
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32

    def run(module: object, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        arguments = (x if x is None or dtype is None else x.to(dtype) for x in tensors)
        found = getattr(module, verb)(*arguments, window, groups, *last)
        return found if isinstance(found, tuple) else (found,)

    exact, eager, ours = run(reference, torch.float64), run(reference, wide), run(kernels, None)
    for part, result in enumerate(ours):
        assert result.dtype == wide
        floor = 4 * torch.finfo(wide).eps * (cancellation(name, tensors, exact[0]) if "dots" in verb else 1.0)
        assert_as_exact_as(verb, result, exact[part], eager[part], floor=floor)


def cancellation(name: str, tensors: tuple[Tensor, ...], dots: Tensor) -> float:
    """How many times the gradients' sizes exceed their products."""
    pairs = (tuple(x.double() for x in pair) for pair in (tensors[:2], tensors[2:]))
    norms = [reference.conv_sqnorms(*pair, *LAYERS[name][-2:], True, 0).sum().sqrt() for pair in pairs]
    return max(1.0, (norms[0] * norms[1] / dots.norm()).item())


@EACH_LAYER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_verbs(name: str, dtype: torch.dtype) -> None:
    first, second = maps(name, 2, dtype), maps(name, 3, dtype, 5)
    check(name, "conv_sqnorms", first, True, 3)
    check(name, "conv_grads", (*first, None), True)
    check(name, "conv_dots", (*first, *second), True, False)


@EACH_LAYER
def test_sums(name: str) -> None:
    first, second = maps(name, 2, torch.float32), maps(name, 3, torch.float32, 5)
    check(name, "conv_grads", (*first, randn(2, seed=9)), True)
    check(name, "conv_grads", (*first, randn(2, seed=9)), False)
    check(name, "conv_dots", (*first, *second), True, True)
    check(name, "conv_dots", (*first, *second), False, True)


def test_strides_and_mixed_types() -> None:
    a, g = maps("everything", 2, torch.bfloat16)
    a = a.movedim(1, -1).contiguous().movedim(-1, 1)
    g = g.float().repeat_interleave(2, -1)[..., ::2]
    check("everything", "conv_sqnorms", (a, g), True, 0)
    check("everything", "conv_grads", (a, g[:1].expand_as(g), None), True)


def test_gradients_of_the_second_batch_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_MOST_BYTES", 2 * 4 * 27 * 4)
    check("2d", "conv_dots", (*maps("2d", 2, torch.float32), *maps("2d", 5, torch.float32, 5)), True, False)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize(("channels", "outputs", "size"), [(0, 4, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(batch: int, channels: int, outputs: int, size: int) -> None:
    a, g = randn(batch, channels, 1, 1, size), randn(batch, outputs, 1, 1, size)
    window = [1] * 6 + [0] * 3 + [1] * 3
    assert torch.equal(kernels.conv_sqnorms(a, g, window, 1, size == 0, 0), torch.zeros(batch))
    assert torch.equal(kernels.conv_dots(a, g, a, g, window, 1, False, False), torch.zeros(batch, batch))
    weight, bias = kernels.conv_grads(a, g, None, window, 1, True)
    assert weight.shape == (batch, outputs, channels, 1, 1, 1)
    assert bias.shape == (batch, outputs)
    weight, _ = kernels.conv_grads(a, g, torch.ones(batch), window, 1, True)
    assert torch.equal(weight, torch.zeros(outputs, channels, 1, 1, 1))


@pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value: float) -> None:
    a, g = maps("2d", 3, torch.float32)
    arguments = LAYERS["2d"][-2], 1, True, 0
    clean = kernels.conv_sqnorms(a, g, *arguments)
    a[1, 0, 0, 2, 2] = value
    result = kernels.conv_sqnorms(a, g, *arguments)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])


def test_large_half_values_do_not_overflow() -> None:
    a, g = (10 * x for x in maps("2d", 2, torch.float64))
    check("2d", "conv_sqnorms", (a.half(), (1000 * g).half()), True, 0)

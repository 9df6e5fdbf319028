"""The Triton negative log-likelihoods and their gradients against the float64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference import token_loss as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels import token_loss as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("nll", "lse", "d_h", "d_weight", "d_bias")


def make(
    rows: tuple[int, ...], d: int, V: int, dtype: torch.dtype = torch.float32, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, int]:
    labels = torch.arange(rows[0] if rows else 1).view(-1, *[1] * (len(rows) - 1)).expand(rows) * 7 % V
    labels = labels.masked_fill(torch.arange(labels.numel()).view(rows) % 3 == 1, -100)
    b = randn(V, dtype=dtype, seed=3) if bias else None
    return randn(*rows, d, dtype=dtype), randn(V, d, dtype=dtype, seed=1) * d**-0.5, b, labels, -100


def doubled(arguments: tuple) -> tuple:
    floating = (x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    return tuple(floating)


def both(
    module,
    arguments: tuple,
    grad: Tensor,
    need_h: bool = True,
    need_weight: bool = True,
    logits: tuple[float, float] = (1.0, 0.0),
) -> list[Tensor]:
    nll, lse, kept = module.linear_nll_forward(*arguments, *logits, 0)
    *inputs, ignore_index = arguments
    gradients = module.linear_nll_backward(
        grad.to(nll.dtype), *inputs, lse, kept, ignore_index, *logits, need_h, need_weight
    )
    return [nll, lse, *gradients]


def check(arguments: tuple, **needs: Any) -> None:
    grad = randn(*arguments[3].shape, seed=4)
    actual, eager = both(kernels, arguments, grad, **needs), both(reference, arguments, grad, **needs)
    exact = both(reference, doubled(arguments), grad, **needs)
    for name, *tensors in zip(NAMES, actual, exact, eager, strict=True):
        assert tensors[0].dtype == tensors[2].dtype, name
        assert_as_exact_as(name, *tensors)


@pytest.mark.parametrize("bounds", [None, torch.tensor([1.0, 9.0])], ids=["sum", "preference"])
@pytest.mark.parametrize("need_weight", [True, False])
def test_sweep(need_weight: bool, bounds: Tensor | None) -> None:
    arguments = make((2, 5), 7, 11)
    weights, settings = randn(2, 5, seed=4), (1.0, 0.0, need_weight)
    actual, eager = (
        m.linear_nll_sweep(weights, *arguments, *settings, bounds, 0.5) for m in (kernels, reference)
    )
    bounds = None if bounds is None else bounds.double()
    exact = reference.linear_nll_sweep(weights.double(), *doubled(arguments), *settings, bounds, 0.5)
    for name, *tensors in zip(("nll", "d_h", "d_weight", "d_bias"), actual, exact, eager, strict=True):
        assert_as_exact_as(name, *tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    check(make((2, 5), 7, 11, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("logits", [(0.5, 0.0), (2.0, 1.5)], ids=str)
def test_scale_and_softcap(dtype: torch.dtype, logits: tuple[float, float]) -> None:
    check(make((2, 5), 7, 11, dtype), logits=logits)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "d", "V"), [((1,), 1, 1), ((70,), 19, 130), ((5,), 70, 600)], ids=str)
def test_shapes(rows: tuple[int, ...], d: int, V: int, bias: bool) -> None:
    check(make(rows, d, V, bias=bias))


def test_blocks_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    check(make((40,), 9, 1100))


@pytest.mark.parametrize(("need_h", "need_weight"), [(True, False), (False, True), (False, False)])
def test_only_what_is_needed(need_h: bool, need_weight: bool) -> None:
    check(make((9,), 6, 21), need_h=need_h, need_weight=need_weight)


def test_strides_and_mixed_types() -> None:
    h, weight, bias, labels, ignored = make((4, 8), 12, 40)
    wide = randn(4, 9, 24, dtype=torch.bfloat16, seed=5)
    check((wide[:, :-1, ::2], weight, bias, labels, ignored))
    check((h, randn(12, 40, seed=6).T, randn(80, seed=7)[::2], labels, ignored))


@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
def test_empty(rows: tuple[int, ...]) -> None:
    check((torch.ones(*rows, 5), randn(7, 5), None, torch.zeros(rows, dtype=torch.long), -100))


def test_all_ignored() -> None:
    h, weight, bias, labels, ignored = make((6,), 5, 7)
    check((h * float("nan"), weight, bias, torch.full_like(labels, -100), ignored))


def test_rows_that_do_not_count_are_never_read() -> None:
    h, weight, bias, labels, ignored = make((9,), 5, 7)
    poisoned = h.masked_fill((labels == -100)[:, None], float("nan"))
    results = (both(kernels, (x, weight, bias, labels, ignored), torch.ones(9)) for x in (h, poisoned))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_labels_outside_the_vocabulary_give_nan() -> None:
    h, weight, bias, labels, ignored = make((6,), 5, 7)
    labels = labels.clone()
    labels[2] = 7
    nll, _, d_h, *_ = both(kernels, (h, weight, bias, labels, ignored), torch.ones(6))
    assert nll.isnan().tolist() == [False, False, True, False, False, False]
    assert d_h.isnan().any(1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_infinite_and_nan_logits_pass_through(value: float) -> None:
    h, weight, bias, labels, ignored = make((6,), 5, 70)
    bias[66] = value
    arguments = (h, weight, bias, labels, ignored)
    actual, expected = (both(module, arguments, torch.ones(6)) for module in (kernels, reference))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_large_logits() -> None:
    h, weight, bias, labels, ignored = make((6,), 5, 70)
    check((h, weight * 1e4, bias, labels, ignored))

"""Values and gradients of the kernels against the definition."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.token_loss.extended import nll_and_gradients
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.token_loss import linear_nll

MakeHead = Callable[..., Any]
Head = Any  # conftest.Head
Loss = Callable[..., Tensor]

# One row, one column, one label; primes; more than one tile and block of the reduction each way.
SHAPES = [
    ((1,), 1, 1),
    ((7,), 5, 11),
    ((2, 3), 1, 3),
    ((13,), 300, 17),
    ((2, 211), 33, 1009),
    ((500,), 3, 5003),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def _gradients(x: Head, call: Loss, upstream: Tensor) -> list[Tensor]:
    leaves = x.leaves()
    nll = call(*leaves[:2], x.labels, leaves[2] if x.bias is not None else None)
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


def _reference(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    return linear_nll(h, W, labels, bias=bias, backend="reference")


def _kernels(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    return linear_nll(h, W, labels, bias=bias, backend="cpp")


def _check(x: Head, upstream: Tensor) -> None:
    actual, eager = (_gradients(x, call, upstream) for call in (_kernels, _reference))
    exact = nll_and_gradients(x, upstream)
    for name, *tensors in zip(("nll", "h", "W", "bias"), actual, exact, eager, strict=False):
        assert tensors[0].dtype == tensors[2].dtype
        assert_as_exact_as(name, *tensors)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "d", "V"), SHAPES)
def test_shapes(head: MakeHead, rows: tuple[int, ...], d: int, V: int, bias: bool) -> None:
    _check(head(rows, d, V, bias=bias), randn(*rows, seed=4))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(head: MakeHead, dtype: torch.dtype) -> None:
    _check(head((3, 19), 37, 701, dtype), randn(3, 19, seed=4))


@pytest.mark.parametrize(("h", "W"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)])
def test_mixed_dtypes(head: MakeHead, h: torch.dtype, W: torch.dtype) -> None:
    x = head((29,), 24, 97)
    _check(x._replace(h=x.h.to(h), W=x.W.to(W)), randn(29, seed=4))


def test_strides(head: MakeHead) -> None:
    x = head((4, 9), 12, 51)
    wide = randn(4, 20, 24, seed=5)
    views = {
        "shifted": x._replace(h=wide[:, :9, :12]),
        "spread": x._replace(h=wide[:, 1:19:2, ::2]),
        "transposed": x._replace(h=randn(9, 4, 12, seed=6).transpose(0, 1), labels=x.labels.T.contiguous().T),
        "expanded": x._replace(h=randn(12, seed=7).expand(4, 9, 12)),
        "tied": x._replace(W=randn(12, 51, seed=8).T),
        "every other": x._replace(W=randn(102, 24, seed=9)[::2, ::2], bias=randn(102, seed=10)[::2]),
    }
    for view in views.values():
        _check(view, randn(4, 9, seed=4))


def test_expanded_upstream_gradient(head: MakeHead) -> None:
    x = head((4, 9), 12, 51)
    _check(x, torch.tensor(0.25).expand(4, 9))


def test_next_token_views_agree_with_copies(head: MakeHead) -> None:
    x = head((3, 8), 16, 40)
    h, labels = x.h[:, :-1], x.labels[:, 1:]
    torch.testing.assert_close(
        linear_nll(h, x.W, labels), linear_nll(h.contiguous(), x.W, labels.contiguous()), rtol=0, atol=0
    )


@pytest.mark.parametrize("rows", [(0,), (2, 0), ()])
def test_empty_and_scalar_batches(head: MakeHead, rows: tuple[int, ...]) -> None:
    x = head(rows, 5, 7, ignored=0.0)
    _check(x, torch.ones(rows))


def test_all_rows_ignored(head: MakeHead) -> None:
    x = head((4,), 5, 7, ignored=1.0)
    nll, *gradients = _gradients(x, _kernels, torch.ones(4))
    assert not nll.any()
    assert not any(g.any() for g in gradients)


def test_ignored_rows_are_never_read(head: MakeHead) -> None:
    x = head((2, 9), 12, 51)
    poisoned = x._replace(h=x.h.masked_fill((x.labels == -100).unsqueeze(-1), float("nan")))
    for ours, clean in zip(
        _gradients(poisoned, _kernels, torch.ones(2, 9)),
        _gradients(x, _kernels, torch.ones(2, 9)),
        strict=True,
    ):
        torch.testing.assert_close(ours, clean, rtol=0, atol=0)


def test_other_ignore_index_and_int32_labels(head: MakeHead) -> None:
    x = head((20,), 5, 7, ignored=0.0)
    expected = linear_nll(x.h, x.W, x.labels).masked_fill(x.labels == 3, 0.0)
    torch.testing.assert_close(linear_nll(x.h, x.W, x.labels.int(), ignore_index=3), expected)


@pytest.mark.parametrize("scale", [1e2, 1e4, -1e4])
def test_large_logits(head: MakeHead, scale: float) -> None:
    x = head((30,), 8, 300)
    _check(x._replace(W=x.W * scale), randn(30, seed=4))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("column", [0, 250, 299])
def test_infinite_and_nan_logits_pass_through(head: MakeHead, value: float, column: int) -> None:
    x = head((30,), 8, 300, torch.float32)
    bias = x.bias.clone()
    bias[column] = value
    labels = x.labels.clone()
    labels[:2] = torch.tensor([column, 1])
    actual, expected = (
        _gradients(x._replace(bias=bias, labels=labels), call, torch.ones(30))
        for call in (_kernels, _reference)
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_all_logits_minus_infinity(head: MakeHead) -> None:
    x = head((3,), 4, 300)
    bias = torch.full((300,), float("-inf"))
    assert linear_nll(x.h, x.W, x.labels.clamp_min(0), bias=bias).isnan().all()


def test_half_gradients_do_not_overflow_inside(head: MakeHead) -> None:
    # Each row of d_W is 2e5 (the softmax, 4096 terms) - 2e5 (its own label): both out of fp16's range.
    V = 4096
    h, W = (
        torch.full((4096, 2), 100.0, dtype=torch.float16),
        torch.zeros(V, 2, dtype=torch.float16).requires_grad_(),
    )
    nll = linear_nll(h, W, torch.arange(4096))
    (d_W,) = torch.autograd.grad(nll, W, torch.full((4096,), 2000.0))
    assert d_W.isfinite().all()
    assert d_W.abs().max() < 100


def test_frozen_parts_get_no_gradient(head: MakeHead) -> None:
    x = head((9,), 6, 21)
    h = x.h.requires_grad_()
    (d_h,) = torch.autograd.grad(linear_nll(h, x.W, x.labels, bias=x.bias).sum(), h)
    W = x.W.requires_grad_()
    both = torch.autograd.grad(linear_nll(h, W, x.labels, bias=x.bias).sum(), (h, W))
    torch.testing.assert_close(d_h, both[0], rtol=0, atol=0)


def test_agrees_with_cross_entropy_at_scale() -> None:
    h, W = randn(300, 96), randn(8000, 96, seed=1) * 0.1
    labels = torch.arange(300)
    ours, eager, exact = (
        linear_nll(h, W, labels),
        F.cross_entropy(h @ W.T, labels, reduction="none"),
        F.cross_entropy(h.double() @ W.double().T, labels, reduction="none"),
    )
    assert_as_exact_as("nll", ours, exact, eager)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"W": torch.ones(3)}, "W"),
        ({"W": torch.ones(7, 4)}, "h"),
        ({"labels": torch.zeros(8, dtype=torch.long)}, "labels"),
        ({"labels": torch.zeros(9)}, "labels"),
        ({"bias": torch.ones(8)}, "bias"),
        ({"W": torch.ones(7, 5, dtype=torch.float64)}, "W"),
        ({"h": torch.ones(9, 5, dtype=torch.long)}, "h"),
        ({"labels": torch.zeros(9, dtype=torch.long, device="meta")}, "labels"),
    ],
)
def test_misuse_names_the_argument(head: MakeHead, change: dict[str, Tensor], name: str) -> None:
    x = head((9,), 5, 7)._replace(**change)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        linear_nll(x.h, x.W, x.labels, bias=x.bias)


@pytest.mark.parametrize("label", [7, -1, 2**40])
def test_labels_out_of_range(head: MakeHead, label: int) -> None:
    x = head((9,), 5, 7)
    x.labels[4] = label
    with pytest.raises(ValueError, match=rf"labels must be in \[0, 7\) or -100, got {label}"):
        linear_nll(x.h, x.W, x.labels)

"""The specification against PyTorch's own cross entropy and autograd, in float64."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels.reference import token_loss as reference

MakeHead = Callable[..., Any]


def _cross_entropy(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    z = h @ W.T + bias
    flat = F.cross_entropy(z.flatten(0, -2), labels.flatten(), reduction="none", ignore_index=-100)
    return flat.view(labels.shape)


def test_values_and_gradients_are_those_of_cross_entropy(head: MakeHead) -> None:
    x = head((3, 5), 7, 13, torch.float64)
    leaves = x.leaves()
    expected = _cross_entropy(leaves[0], leaves[1], x.labels, leaves[2])
    actual = reference.linear_nll(leaves[0], leaves[1], leaves[2], x.labels, -100)
    torch.testing.assert_close(actual, expected)
    upstream = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    for ours, theirs in zip(
        torch.autograd.grad(actual, leaves, upstream),
        torch.autograd.grad(expected, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_raw_backward_is_the_gradient_of_the_raw_forward(head: MakeHead) -> None:
    x = head((3, 5), 7, 13, torch.float64)
    leaves = x.leaves()
    nll, lse, kept = reference.linear_nll_forward(leaves[0], leaves[1], leaves[2], x.labels, -100, 1.5, 3.0)
    upstream = torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5)
    expected = torch.autograd.grad(nll, leaves, upstream)
    actual = reference.linear_nll_backward(
        upstream, x.h, x.W, x.bias, x.labels, lse.detach(), kept, -100, 1.5, 3.0, True, True
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_ignored_rows_count_as_absent(head: MakeHead) -> None:
    x = head((6,), 4, 5, torch.float64, ignored=0.0)
    labels = x.labels.clone()
    labels[[1, 4]] = -100
    x.h[1] = float("nan")
    nll, lse, _ = reference.linear_nll_forward(x.h, x.W, x.bias, labels, -100)
    assert nll[[1, 4]].tolist() == lse[[1, 4]].tolist() == [0.0, 0.0]
    assert nll.isfinite().all()

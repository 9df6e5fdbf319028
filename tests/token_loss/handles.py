"""Lazy logits of a small head in float64, and its hidden states and labels."""

import torch
from torch import Tensor, nn

from unlearn_kernels.testing import randn
from unlearn_kernels.token_loss import LazyLogits, lazy_logits

B, T, D, V = 2, 5, 4, 7
LABELS = torch.tensor([[3, -100, 0, 6, 2], [1, 1, -100, 5, 4]])
FULL = LABELS.clamp_min(0)


def head(bias: bool = True) -> nn.Linear:
    made = nn.Linear(D, V, bias=bias, dtype=torch.float64)
    made.weight.data = randn(V, D, dtype=torch.float64, seed=1)
    if bias:
        made.bias.data = randn(V, dtype=torch.float64, seed=2)
    return made


def hidden() -> Tensor:
    return randn(B, T, D, dtype=torch.float64).requires_grad_()


def made(strict: bool = False, bias: bool = True, h: Tensor | None = None) -> LazyLogits:
    linear = head(bias)
    lazy_logits(nn.Sequential(), head=linear, strict=strict)
    return linear(hidden() if h is None else h)

"""Heads, tokens and the definition of their per-sample gradients, for the tests of `lm_head`."""

from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_kernels.testing import randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    h: Tensor
    W: Tensor
    labels: Tensor
    upstream: Tensor | None
    bias: Tensor | None


def case(
    batch: int,
    tokens: int,
    features: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    weighted: bool = True,
    ignored: bool = True,
    seed: int = 0,
) -> Case:
    """Logits of about unit size; every fifth label is ignored, and all of the last sample's but one."""
    h = randn(batch, tokens, features, dtype=dtype, seed=seed)
    W = randn(vocabulary, features, dtype=torch.float64, seed=seed + 1) * max(features, 1) ** -0.5
    labels = torch.arange(batch * tokens).view(batch, tokens) * 7919 % max(vocabulary, 1)
    if ignored:
        labels = labels.masked_fill(torch.arange(batch * tokens).view(batch, tokens) % 5 == 3, -100)
        labels[-1:, 1:] = -100
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upstream = randn(batch, tokens, dtype=wide, seed=seed + 2) if weighted else None
    offset = randn(vocabulary, dtype=dtype, seed=seed + 3) if bias else None
    return Case(h, W.to(dtype), labels, upstream, offset)


def by_autograd(x: Case, ignore_index: int = -100) -> Tensor:
    """The gradients of each sample's loss to weight and bias, (B, V d (+ V)), by one float64 backward a sample."""
    W = x.W.double().requires_grad_()
    parameters = [W] if x.bias is None else [W, x.bias.double().requires_grad_()]
    rows = []
    for i in range(len(x.h)):
        logits = torch.nn.functional.linear(x.h[i].double(), *parameters).flatten(0, -2)
        nll = torch.nn.functional.cross_entropy(
            logits, x.labels[i].flatten(), reduction="none", ignore_index=ignore_index
        )
        upstream = torch.ones_like(nll) if x.upstream is None else x.upstream[i].double().flatten()
        # Ignored tokens take no part, whatever weighs them.
        gradients = torch.autograd.grad(nll @ upstream, parameters)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    size = sum(p.numel() for p in parameters)
    return torch.stack(rows) if rows else torch.zeros(0, size, dtype=torch.float64)


def wide(x: Case) -> Case:
    """The case in the type that is accumulated in."""
    dtype = torch.float64 if x.h.dtype == torch.float64 else torch.float32
    return Case(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in x))


def logsumexps(x: Case) -> Tensor:
    """As the forward leaves them: computed in float64, rounded."""
    z = x.h.double() @ x.W.double().T + (0 if x.bias is None else x.bias.double())
    return z.logsumexp(-1).to(torch.float64 if x.h.dtype == torch.float64 else torch.float32)

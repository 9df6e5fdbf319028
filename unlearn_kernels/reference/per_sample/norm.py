"""Per-sample gradients of the scale and the bias of normalisation layers in plain formulas."""

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype

LAYER, RMS, GROUP = range(3)


def normalised(x: Tensor, kind: int, groups: int, eps: float) -> Tensor:
    """`x_hat`: tokens (B, T, d) by their own statistics, channels (B, C, S) by those of their group."""
    if kind == RMS:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    shape = (x.shape[0], groups, x.shape[1] // groups * x.shape[2]) if kind == GROUP else x.shape
    x = x.reshape(shape)
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)


def norm_grads(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    """Sums over positions of `x_hat g` and, after them, of `g`: (B, 1 + bias, d), or C for d."""
    dtype = accumulation_dtype(x, g)
    g, over = g.to(dtype), 2 if kind == GROUP else 1
    scale = (normalised(x.to(dtype), kind, groups, eps).reshape(x.shape) * g).sum(over)
    return torch.stack([scale, g.sum(over)] if bias else [scale], dim=1)


def norm_sqnorms(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    """Their squared norms, (B,)."""
    return norm_grads(x, g, kind, groups, eps, bias).square().sum(dim=(1, 2))

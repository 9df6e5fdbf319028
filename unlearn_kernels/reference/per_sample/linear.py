"""Per-sample gradients of a linear layer in plain formulas."""

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype


def linear_grads(a: Tensor, g: Tensor, bias: bool = False) -> Tensor:
    """`W_i = G_i^T [A_i, 1]`, (B, p, d) or, with the bias as a last column, (B, p, d + 1)."""
    dtype = accumulation_dtype(a, g)
    a, g = a.to(dtype), g.to(dtype)
    if bias:
        a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], dim=-1)
    return g.transpose(1, 2) @ a


def linear_sqnorms(a: Tensor, g: Tensor, bias: bool, method: int) -> Tensor:
    """`||W_i||_F^2`, (B,); every method has the same value."""
    return linear_grads(a, g, bias).square().sum(dim=(1, 2))

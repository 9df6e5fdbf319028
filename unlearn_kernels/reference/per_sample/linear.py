"""Per-sample gradients of a linear layer in plain formulas."""

import torch
from torch import Tensor

from unlearn_kernels.reference import influence
from unlearn_kernels.reference.dtypes import accumulation_dtype


def linear_grads(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`W_i = G_i^T A_i`, (B, p, d), and `b_i = sum_t g_it`, (B, p) or empty."""
    dtype = accumulation_dtype(a, g)
    a, g = a.to(dtype), g.to(dtype)
    return g.transpose(1, 2) @ a, g.sum(dim=1) if bias else g.new_empty(0, g.shape[-1])


def flat_grads(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """The gradients as rows: the weight's row by row, then the bias's, (B, p d + p)."""
    weight, offset = linear_grads(a, g, bias)
    return torch.cat([weight.flatten(1), offset], dim=1) if bias else weight.flatten(1)


def linear_sqnorms(a: Tensor, g: Tensor, bias: bool, method: int) -> Tensor:
    """`||W_i||_F^2`, (B,); every method has the same value."""
    return flat_grads(a, g, bias).square().sum(dim=1)


def linear_dots(
    a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor, summed: bool, bias: bool, method: int
) -> Tensor:
    """`<W_i, W'_j>`, (B1, B2), or `<W_i, sum_j W'_j>`, (B1,); every method has the same value."""
    one, two = flat_grads(a1, g1, bias), flat_grads(a2, g2, bias)
    return one @ two.sum(dim=0) if summed else one @ two.T


def linear_weighted_sum(a: Tensor, g: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """`sum_i w_i W_i`, (p, d), and `sum_i w_i b_i`, (p,) or empty, in the dtype of `g`."""
    dtype = accumulation_dtype(a, g)
    scaled = (g.to(dtype) * w[:, None, None]).flatten(0, 1)
    weight = scaled.T @ a.to(dtype).flatten(0, 1)
    return weight.to(g.dtype), (scaled.sum(dim=0) if bias else scaled.new_empty(0)).to(g.dtype)


def linear_two_sided(a: Tensor, g: Tensor, left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """`L W_i R^T` row by row, (B, k_o k_i), and `L b_i` after it, k_o more."""
    weight, offset = linear_grads(a, g, bias)
    projected = (left.to(weight.dtype) @ weight @ right.to(weight.dtype).T).flatten(1)
    return torch.cat([projected, offset @ left.to(weight.dtype).T], dim=1) if bias else projected


def linear_sketch(a: Tensor, g: Tensor, bias: bool, k: int, seed: int) -> Tensor:
    """The Rademacher projection of the flattened gradients, (B, k)."""
    return influence.rademacher_project(flat_grads(a, g, bias), k, seed)

"""Gradient surgery in plain formulas. Lists of tensors stand for one long vector each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _sum_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any tensor is, otherwise float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def _split(tensors: Sequence[Tensor], sets: int) -> list[Sequence[Tensor]]:
    count = len(tensors) // sets
    return [tensors[k * count : (k + 1) * count] for k in range(sets)]


def _dot(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(x, y, strict=True)]).sum()


def gramian(tensors: Sequence[Tensor], sets: int) -> Tensor:
    """`G[a, b] = <g_a, g_b>`, (sets, sets) float64; tensors set by set."""
    g = _split(tensors, sets)
    return torch.stack([torch.stack([_dot(x, y) for y in g]) for x in g])


def combine_(out: Sequence[Tensor], tensors: Sequence[Tensor], weights: Tensor) -> None:
    """`out = sum_k w_k g_k`, summed in float64 and rounded once to the dtype of `out`."""
    g = _split(tensors, weights.numel())
    sums = [sum(w * x.double() for w, x in zip(weights, xs, strict=True)) for xs in zip(*g, strict=True)]
    for o, s in zip(out, sums, strict=True):
        o.copy_(s)


def agem_weights(gramian: Tensor) -> Tensor:
    """`(1, -min(0, <f, r>) / |r|^2)`; 0 for a retain gradient of zero; a NaN passes."""
    dot, square = gramian[0, 1], gramian[1, 1]
    conflict = ~(dot >= 0) & (square != 0)
    return torch.stack([torch.ones_like(dot), torch.where(conflict, -dot / square, 0.0)])


def project_conflict_(forget: Sequence[Tensor], retain: Sequence[Tensor], rule: int) -> tuple[Tensor, Tensor]:
    """`f -= min(0, <f, r>) / |r|^2 r`; the Gramian of (f, r) and the weights. `rule` is 0: A-GEM."""
    tensors = [*forget, *retain]
    G = gramian(tensors, 2)
    weights = agem_weights(G)
    if weights[1] != 0:
        combine_(forget, tensors, weights)
    return G, weights

"""Inner products in the metric of Adam, in plain formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_gramian(
    tensors: Sequence[Tensor], sets: int, seconds: Sequence[Tensor], scales: Tensor, eps: float
) -> Tensor:
    """`G[a, b] = sum a b / (sqrt(scale v) + eps)`, (sets, sets) float64; tensors set by set, a scale a place."""
    n = len(seconds)
    G = torch.zeros(sets, sets, dtype=torch.float64, device=tensors[0].device)
    for i, v in enumerate(seconds):
        g = torch.stack([x.double().reshape(-1) for x in tensors[i::n]])
        metric = 1 / ((scales[i].double() * v.double()).sqrt() + eps)
        G += (g * metric.reshape(-1)) @ g.T
    return (G + G.T) / 2

"""What published unlearning code does to its gradients between the backward pass and the optimizer, in our words."""

from __future__ import annotations

import torch
from torch import Tensor


def doco(forget: list[Tensor], retain: list[Tensor]) -> None:
    """A clone, two norms, a dot product and a wait for its sign a tensor, as the training loop of DoCo has it."""
    kept = [r.clone() for r in retain]
    for f, r in zip(forget, kept, strict=True):
        f_unit, r_unit = f / (f.norm() + 1e-8), r / (r.norm() + 1e-8)
        cosine = torch.dot(f_unit.flatten(), r_unit.flatten())
        if cosine < 0:
            f.sub_(cosine * r_unit)


def gdr_gma(forget: list[Tensor], retain: list[Tensor], lam: float = 0.5) -> None:
    """Both gradients flattened and rectified a tensor at a time, the second along what became of the first."""
    for f, r in zip(forget, retain, strict=True):
        x, y = r.clone().flatten(), f.clone().flatten()
        if torch.cosine_similarity(x, y, dim=0) < 0:
            dot, square = torch.dot(x, y), torch.dot(x, x)
            x = x - dot / torch.dot(y, y) * y
            y = y - dot / square * x
        f.copy_(((1 - lam) * x + lam * y).view_as(f))


def sago(forget: list[Tensor], retain: list[Tensor], alpha: float = 1.0, gamma: float = 1.0) -> None:
    """Two boolean masks and four indexings a tensor."""
    for f, r in zip(forget, retain, strict=True):
        conflict = torch.sign(f) * torch.sign(r) < 0
        made = torch.zeros_like(f)
        made[conflict] = alpha * r[conflict]
        made[~conflict] = gamma * f[~conflict]
        f.copy_(made)


def sago_where(forget: list[Tensor], retain: list[Tensor]) -> None:
    """The same with a choice for each element."""
    for f, r in zip(forget, retain, strict=True):
        f.copy_(torch.where(torch.sign(f) * torch.sign(r) < 0, r, f))


def salun_masks(tensors: list[Tensor], fraction: float) -> list[Tensor]:
    """Ranks of all magnitudes by two sorts, as SalUn's code makes its masks."""
    size = -torch.cat([x.abs().flatten() for x in tensors])
    ranks = torch.argsort(torch.argsort(size)).split([x.numel() for x in tensors])
    k = int(len(size) * fraction)
    return [(rank < k).view(x.shape) for rank, x in zip(ranks, tensors, strict=True)]


def threshold_masks(tensors: list[Tensor], fraction: float) -> list[Tensor]:
    """All that reaches the k-th magnitude: more than k where that occurs more than once."""
    size = torch.cat([x.abs().flatten() for x in tensors])
    least = size.kthvalue(len(size) - int(len(size) * fraction) + 1).values
    return [x.abs() >= least for x in tensors]


def graddrop(forget: list[Tensor], retain: list[Tensor]) -> None:
    """The sign that a probability chooses is kept, for each element, from temporaries of whole tensors."""
    for f, r in zip(forget, retain, strict=True):
        positive = 0.5 * (1 + (f + r) / (f.abs() + r.abs()))
        chance = torch.rand_like(f)
        made = [x * ((positive > chance) & (x > 0) | (positive < chance) & (x < 0)) for x in (f, r)]
        f.copy_(made[0] + made[1])


def agem_rows(forget: list[Tensor], retain: list[Tensor]) -> None:
    """One projection for each row of a matrix, for each vector as a whole."""
    for f, r in zip(forget, retain, strict=True):
        x, y = (t if t.dim() > 1 else t[None] for t in (f, r))
        dot = (x * y).sum(1, keepdim=True).clamp(max=0)
        x.sub_(dot / y.square().sum(1, keepdim=True) * y)

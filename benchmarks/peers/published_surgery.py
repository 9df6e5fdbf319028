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

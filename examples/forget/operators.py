"""The hot operations of the job, twice: with the kernels, and in ordinary PyTorch as it is usually written.

Both classes have the same methods, so that attribution and unlearning are written once and run with either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels import influence, surgery, token_loss
from unlearn_kernels.per_sample import linear

from .model import IGNORE

Gradients = list[Tensor]
Projection = Callable[[Tensor], Tensor]


class Clipped(NamedTuple):
    """The mean over the batch of clipped per-sample gradients, by layer, and their norms before, `(B,)`."""

    gradients: Gradients
    norms: Tensor


class Operators(Protocol):
    """What attribution and unlearning need; shapes as in the methods of `Plain`."""

    def projection(self, dim: int, k: int, seed: int, like: Tensor) -> Projection: ...
    def topk(self, queries: Tensor, rows: Tensor, k: int) -> Tensor: ...
    def token_nll(self, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor: ...
    def npo(self, hidden: Tensor, head: Tensor, labels: Tensor, reference: Tensor, beta: float) -> Tensor: ...
    def clip(self, inputs: Gradients, outputs: Gradients, limit: float) -> Clipped: ...
    def merge(self, forget: Gradients, retain: Gradients, strength: float) -> tuple[Gradients, float]: ...


def clip_weights(norms: Tensor, limit: float) -> Tensor:
    """`min(1, C / norm) / B` for each of B samples."""
    return (limit / norms.clamp_min(1e-30)).clamp_max(1.0) / norms.numel()


class Kernels:
    """Every operation through `unlearn_kernels`."""

    def projection(self, dim: int, k: int, seed: int, like: Tensor) -> Projection:
        return influence.Projection(dim, k, kind="rademacher", seed=seed)

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> Tensor:
        return influence.topk(queries, rows, k).indices

    def token_nll(self, hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
        return token_loss.linear_nll(hidden, head, labels, ignore_index=IGNORE)

    def npo(self, hidden: Tensor, head: Tensor, labels: Tensor, reference: Tensor, beta: float) -> Tensor:
        return token_loss.npo(hidden, head, labels, reference, beta=beta, ignore_index=IGNORE)

    def clip(self, inputs: Gradients, outputs: Gradients, limit: float) -> Clipped:
        layers = list(zip(inputs, outputs, strict=True))
        norms = torch.stack([linear.sqnorms(a, g) for a, g in layers]).sum(0).sqrt()
        weights = clip_weights(norms, limit)
        return Clipped([linear.weighted_sum(a, g, weights)[0] for a, g in layers], norms)

    def merge(self, forget: Gradients, retain: Gradients, strength: float) -> tuple[Gradients, float]:
        conflict = surgery.project_conflict_(forget, retain, rule="agem")
        surgery.combine_([retain, forget], torch.tensor([1.0, strength], dtype=torch.float64))
        return retain, float(conflict.cosine)


class Plain:
    """Full logits, materialised per-sample gradients, a dense sign matrix, flattened gradients."""

    def projection(self, dim: int, k: int, seed: int, like: Tensor) -> Projection:
        """A dense matrix of signs, drawn once and kept: to draw it again for every batch would be slower.

        The signs are those of `Kernels`, so that both runs can be compared number by number.
        """
        source = influence.Projection(dim, k, kind="rademacher", seed=seed)
        signs = torch.empty(dim, k, dtype=like.dtype, device=like.device)
        for columns in torch.arange(dim).split(1 << 10):
            signs[columns] = source.signs(torch.arange(k), columns).T.to(signs)
        return lambda gradients: gradients @ signs / math.sqrt(k)  # [B, dim] -> [B, k]

    def topk(self, queries: Tensor, rows: Tensor, k: int) -> Tensor:  # [Q, k'], [N, k'] -> [Q, k]
        return (queries @ rows.T).topk(k).indices

    def token_nll(
        self, hidden: Tensor, head: Tensor, labels: Tensor
    ) -> Tensor:  # [B, T, d], [V, d], [B, T] -> [B, T]
        logits = hidden @ head.T
        losses = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        return losses.view_as(labels)

    def npo(self, hidden: Tensor, head: Tensor, labels: Tensor, reference: Tensor, beta: float) -> Tensor:
        margin = self.token_nll(hidden, head, labels).sum(1) - reference
        return -2 / beta * F.logsigmoid(beta * margin).mean()

    def clip(self, inputs: Gradients, outputs: Gradients, limit: float) -> Clipped:
        """From layer inputs `(B, T, d)` and per-sample output gradients `(B, T, p)`."""
        samples = [torch.einsum("bto,bti->boi", g, a) for a, g in zip(inputs, outputs, strict=True)]
        norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples]).norm(dim=0)
        weights = clip_weights(norms, limit)
        return Clipped([torch.einsum("b,boi->oi", weights, s) for s in samples], norms)

    def merge(self, forget: Gradients, retain: Gradients, strength: float) -> tuple[Gradients, float]:
        """`retain + strength * projected forget`, and the cosine of the two before the projection.

        The projection is A-GEM's: `forget` loses its component along `retain` where the two disagree.
        """
        f = torch.cat([gradient.flatten() for gradient in forget])
        r = torch.cat([gradient.flatten() for gradient in retain])
        inner = torch.dot(f, r)
        cosine = float(inner / (f.norm() * r.norm()))
        if inner < 0:
            f = f - inner / torch.dot(r, r) * r
        merged = (r + strength * f).split([gradient.numel() for gradient in retain])
        return [part.view_as(gradient) for part, gradient in zip(merged, retain, strict=True)], cosine

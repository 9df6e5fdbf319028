"""One unlearning step, written once for both sets of operators.

forget:   NPO on texts to be forgotten, the gradient clipped per sample
retain:   ordinary likelihood on texts to be kept
surgery:  the part of the forget gradient that would hurt the retain set is removed
update:   retain gradient + strength * what is left of the forget gradient, SGD with momentum
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .capture import captured
from .model import GPT, IGNORE, pad
from .operators import Gradients, Operators
from .training import batches_by_length


@dataclass(frozen=True)
class Recipe:
    beta: float = 0.035  # NPO's inverse temperature
    clip: float = 1.0  # largest norm of a sample's gradient
    strength: float = 1.0  # of the forget gradient against the retain gradient
    rate: float = 0.1
    momentum: float = 0.9


@dataclass(frozen=True)
class Step:
    """What one step saw, before its update."""

    npo: float
    retain_nll: float
    cosine: float  # of the forget and retain gradients; below zero they conflict
    clipped: float  # share of the forget batch that was clipped


class Unlearner:
    """Changes the linear layers of the blocks; embeddings, norms and the head stay as they are."""

    def __init__(self, model: GPT, operators: Operators, recipe: Recipe) -> None:
        self.model, self.operators, self.recipe = model, operators, recipe
        self.layers = list(model.linears().values())
        self.weights = [layer.weight for layer in self.layers]
        model.requires_grad_(False)
        for weight in self.weights:
            weight.requires_grad_(True)
        self.optimizer = torch.optim.SGD(self.weights, lr=recipe.rate, momentum=recipe.momentum)

    @torch.no_grad()
    def reference(self, sequences: Sequence[Tensor]) -> Tensor:
        """Summed negative log-likelihood of each text under the model as it is now, `(N,)`."""
        totals = torch.zeros(len(sequences), dtype=self.model.head.dtype)
        for batch in batches_by_length([len(s) for s in sequences], 2048):
            inputs, labels = pad([sequences[i] for i in batch], self.model.head.device)
            totals[batch] = (
                self.operators.token_nll(self.model(inputs), self.model.head, labels).sum(1).to(totals)
            )
        return totals

    def step(self, forget: Sequence[Tensor], reference: Tensor, retain: Sequence[Tensor]) -> Step:
        npo, forget_gradient, clipped = self._forget(forget, reference)
        nll, retain_gradient = self._retain(retain)
        gradient, cosine = self.operators.merge(forget_gradient, retain_gradient, self.recipe.strength)
        for weight, part in zip(self.weights, gradient, strict=True):
            weight.grad = part
        self.optimizer.step()
        self.optimizer.zero_grad()
        return Step(npo, nll, cosine, clipped)

    def _forget(self, sequences: Sequence[Tensor], reference: Tensor) -> tuple[float, Gradients, float]:
        inputs, labels = pad(sequences, self.model.head.device)
        with captured(self.layers) as calls:
            hidden = self.model(inputs)
        loss = self.operators.npo(hidden, self.model.head, labels, reference.to(hidden), self.recipe.beta)
        # The loss is a mean over the batch; B times its gradient is each sample's own.
        gradients = torch.autograd.grad(len(sequences) * loss, [output for _, output in calls])
        clipped, norms = self.operators.clip([a for a, _ in calls], list(gradients), self.recipe.clip)
        return loss.item(), clipped, float((norms > self.recipe.clip).float().mean())

    def _retain(self, sequences: Sequence[Tensor]) -> tuple[float, Gradients]:
        inputs, labels = pad(sequences, self.model.head.device)
        losses = self.operators.token_nll(self.model(inputs), self.model.head, labels)
        loss = losses.sum() / (labels != IGNORE).sum()
        return loss.item(), list(torch.autograd.grad(loss, self.weights))

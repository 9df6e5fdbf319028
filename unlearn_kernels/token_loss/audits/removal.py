"""Removal and suppression told apart: the target, its paraphrases, and both after a few steps of relearning."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_kernels.token_loss._models import evaluating
from unlearn_kernels.token_loss._options import counting
from unlearn_kernels.token_loss.hidden import MakeRows, hidden_rows
from unlearn_kernels.token_loss.linear import linear_nll

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Relearning:
    """An attacker's few steps.

    Attributes:
        steps: how many, over the batches again and again.
        rate: AdamW's learning rate.
        optimizer: makes another optimiser of the parameters, in place of AdamW.
    """

    steps: int = 10
    rate: float = 1e-4
    optimizer: MakeOptimizer | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")

    def make(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of the parameters."""
        if self.optimizer is not None:
            return self.optimizer(parameters)
        return torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0)


@dataclass(frozen=True)
class RemovalAudit:
    """Mean negative log-likelihoods, in nats a token.

    Attributes:
        target: of what was to be forgotten.
        paraphrases: of the same in other words, which outputs tuned to one wording leave low; None if none were given.
        relearned: of the target after the steps.
        relearned_paraphrases: of the paraphrases after steps on the target alone.
        control: of texts that were never trained on; None if none were given.
        relearned_control: of those after as many steps on them.
        before: of the target under the model before unlearning; None if it was not given.
        steps: of relearning.
    """

    target: float
    paraphrases: float | None
    relearned: float
    relearned_paraphrases: float | None
    control: float | None
    relearned_control: float | None
    before: float | None
    steps: int

    @property
    def gain(self) -> float:
        """Nats a token that the steps gave back of the target."""
        return self.target - self.relearned

    @property
    def savings(self) -> float | None:
        """The gain beyond that of texts never seen: above 0, something was still there to build on."""
        if self.control is None or self.relearned_control is None:
            return None
        return self.gain - (self.control - self.relearned_control)

    @property
    def recovered(self) -> float | None:
        """The share of what unlearning took that the steps gave back; NaN if it took nothing."""
        if self.before is None:
            return None
        taken = self.target - self.before
        return self.gain / taken if taken != 0 else float("nan")

    @property
    def spared(self) -> float | None:
        """The share of what unlearning took from the target's wording that paraphrases do not show."""
        if self.before is None or self.paraphrases is None:
            return None
        taken = self.target - self.before
        return (self.target - self.paraphrases) / taken if taken != 0 else float("nan")


def mean_nll(model: nn.Module, batches: Iterable[Any], *, rows: MakeRows = hidden_rows) -> float:
    """The mean negative log-likelihood a token that counts, in evaluation mode; NaN of none."""
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            found = rows(model, batch)
            nll = linear_nll(found.h, found.W, found.labels, **found.options)
            total += float(nll.sum(dtype=torch.float64))
            count += int(counting(found.labels, found.options).sum())
    return total / count if count else float("nan")


@contextmanager
def relearned(
    model: nn.Module,
    batches: Sequence[Any],
    relearning: Relearning | None = None,
    *,
    parameters: Iterable[nn.Parameter] | None = None,
    rows: MakeRows = hidden_rows,
) -> Iterator[nn.Module]:
    """A model after a few steps of training, for as long as the context lasts.

    On leaving it, also by an exception, parameters, buffers, gradients, their flags and modes are what they were, to
    the bit. The steps are taken in evaluation mode, so that a run gives the same numbers again.

    Args:
        model: what `rows` takes.
        batches: what is learned: mean negative log-likelihood, a batch a step.
        relearning: the steps.
        parameters: what may change; by default every floating-point parameter, frozen or not, as an attacker would.
        rows: what makes hidden states of a batch.

    Yields:
        The model itself.

    Raises:
        ValueError: if there are no batches or no parameters.

    Scratch: a copy of what may change and of the buffers, its gradient, and the optimiser's state.
    """
    relearning = relearning or Relearning()
    if len(batches) == 0:
        raise ValueError("batches must be at least one, got none")
    chosen = [p for p in (model.parameters() if parameters is None else parameters) if p.is_floating_point()]
    if not chosen:
        raise ValueError("parameters must be at least one of floating-point numbers, got none")
    with _restored(model, chosen):
        _learn(model, batches, relearning, chosen, rows)
        yield model


def _learn(
    model: nn.Module,
    batches: Sequence[Any],
    relearning: Relearning,
    chosen: list[nn.Parameter],
    rows: MakeRows,
) -> None:
    model.eval()
    wanted = {id(p) for p in chosen}
    for p in model.parameters():
        p.requires_grad_(id(p) in wanted)
        p.grad = None
    optimizer = relearning.make(chosen)
    with torch.enable_grad():
        for step in range(relearning.steps):
            found = rows(model, batches[step % len(batches)])
            optimizer.zero_grad()
            linear_nll(found.h, found.W, found.labels, reduction="mean", **found.options).backward()
            optimizer.step()
    optimizer.zero_grad()


@contextmanager
def _restored(model: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """Leaves a model as it was found."""
    tensors: list[Tensor] = [*chosen, *model.buffers()]
    copies = [x.detach().clone() for x in tensors]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        with torch.no_grad():
            for x, copy in zip(tensors, copies, strict=True):
                x.copy_(copy)
        for p, flag, gradient in flags:
            p.requires_grad_(flag)
            p.grad = gradient
        for module, training in modes:
            module.training = training


def removal_audit(
    model: nn.Module,
    target: Sequence[Any],
    paraphrases: Sequence[Any] = (),
    *,
    control: Sequence[Any] = (),
    before: float | None = None,
    relearning: Relearning | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    rows: MakeRows = hidden_rows,
) -> RemovalAudit:
    """Look behind a model's outputs: was the target removed, or only no longer said?

    A high likelihood loss on the target alone shows neither. Suppressed knowledge shows in paraphrases that stay
    likely (`spared`), and in how fast the target comes back (`recovered`), faster than texts that the model never saw
    (`savings`). The numbers are given as they are; no threshold makes a verdict of them.

    Args:
        model: after unlearning; left as it was found, to the bit.
        target: batches of what was to be forgotten, as `rows` takes them.
        paraphrases: batches of the same in other words.
        control: batches of texts like the target's that were never trained on.
        before: the target's mean negative log-likelihood before unlearning, as `mean_nll` gives it.
        relearning: the attacker's steps, for target and control alike.
        parameters: what the attacker may change; every parameter by default.
        rows: what makes hidden states of a batch.

    Raises:
        ValueError: if there is no batch of the target, or there are no parameters.

    Sources: Lynch et al. 2024 (arXiv 2402.16835) and Hu et al. 2024 (arXiv 2406.13356) for relearning; Patil et al.
    2023 (arXiv 2309.17410) for paraphrases.
    """
    relearning = relearning or Relearning()
    parameters = None if parameters is None else list(parameters)

    def nll(batches: Sequence[Any]) -> float | None:
        return mean_nll(model, batches, rows=rows) if len(batches) else None

    first, others, unseen = mean_nll(model, target, rows=rows), nll(paraphrases), nll(control)
    with relearned(model, target, relearning, parameters=parameters, rows=rows):
        after, others_after = mean_nll(model, target, rows=rows), nll(paraphrases)
    unseen_after = None
    if len(control):
        with relearned(model, control, relearning, parameters=parameters, rows=rows):
            unseen_after = nll(control)
    return RemovalAudit(first, others, after, others_after, unseen, unseen_after, before, relearning.steps)

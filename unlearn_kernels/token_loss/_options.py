"""What every loss passes on to the kernels, and what they ask of labels."""

from collections.abc import Collection

import torch
from torch import Tensor
from typing_extensions import TypedDict

from unlearn_kernels._backends import Backend


class LogitOptions(TypedDict, total=False):
    """How logits are made of hidden states and head, and by whom.

    Attributes:
        bias: (V,).
        ignore_index: the label of tokens that do not count; -100 by default.
        scale: what multiplies the logits.
        softcap: Gemma-2's soft-cap, above 0.
        backend: see `unlearn_kernels.use_backend`.
    """

    bias: Tensor | None
    ignore_index: int
    scale: float
    softcap: float | None
    backend: Backend | None


class NllOptions(LogitOptions, total=False):
    """The same for losses of likelihoods.

    Attributes:
        memory_budget: see `linear_nll`.
    """

    memory_budget: int | None


def counting(labels: Tensor, options: LogitOptions) -> Tensor:
    """Which tokens count."""
    return labels.long() != options.get("ignore_index", -100)


def by_sequence(x: Tensor) -> Tensor:
    """Sums of (B, ...) over all but the first dimension."""
    return x.reshape(x.shape[0], -1).sum(1) if x.numel() else x.new_zeros(x.shape[0]) + x.sum()


def check_batched(labels: Tensor) -> None:
    """Labels of sequences."""
    if labels.dim() < 1:
        raise ValueError(f"labels must have shape (B, ...), got {tuple(labels.shape)}")


def check_sequences(name: str, values: Tensor, labels: Tensor) -> None:
    """One value a sequence."""
    check_batched(labels)
    if values.shape != labels.shape[:1]:
        wanted, got = tuple(labels.shape[:1]), tuple(values.shape)
        raise ValueError(f"{name} must have one value a sequence, {wanted}, got {got}")


def check_tokens(name: str, values: Tensor, labels: Tensor) -> None:
    """One value a token."""
    if values.shape != labels.shape:
        raise ValueError(
            f"{name} must have one value a token, {tuple(labels.shape)}, got {tuple(values.shape)}"
        )


def check_positive(name: str, value: float) -> None:
    """A parameter that divides, or that a power is taken of."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value}")


def check_dialect(dialect: str, known: Collection[str]) -> None:
    """A dialect's name."""
    if dialect not in known:
        raise ValueError(f"dialect must be one of {', '.join(known)}, got {dialect!r}")


def total_over(values: Tensor, count: Tensor | int) -> Tensor:
    """`sum(values) / count`."""
    return values.sum() / torch.as_tensor(count, dtype=values.dtype, device=values.device)

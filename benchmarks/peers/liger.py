"""Liger-Kernel: its fused linear cross-entropy, and NPO on its chunked loss, the part of it that runs on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def fused_mean(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """The mean over the tokens that count, a chunk of logits at a time, by its Triton kernels."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss: Tensor = LigerFusedLinearCrossEntropyLoss()(W, h.flatten(0, 1), labels.flatten())
    return loss


def npo(h: Tensor, W: Tensor, labels: Tensor, reference_nll: Tensor, beta: float) -> Callable[[], Tensor]:
    """The loss as a function of the leaves `h` and `W`; one sequence a chunk, so one (T, V) block of logits
    lives.
    """
    from liger_kernel.chunked_loss.fused_linear_unpaired_preference import (
        LigerFusedLinearUnpairedPreferenceBase as Base,
    )

    class Npo(Base):
        @staticmethod
        def preference_loss_fn(
            log_prob: Tensor, _labels: Tensor, full_target: Tensor, *, references: Iterator[Tensor]
        ) -> Tensor:
            margin = -log_prob - next(references)
            return -(2.0 / beta) * functional.logsigmoid(beta * margin).sum() / full_target.shape[0]

        @classmethod
        def forward(cls, ctx: Any, h: Tensor, W: Tensor, references: Iterator[Tensor]) -> Any:
            forget = torch.zeros(len(h), dtype=torch.bool, device=h.device)
            return Base.forward(cls, ctx, h, W, labels, forget, compiled=False, references=references)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            return (*Base.backward(ctx, upstream)[:2], None)

    return lambda: Npo.apply(h, W, iter(reference_nll))[0]

"""Losses of a language-model head, straight from its hidden states: no logits in memory."""

from unlearn_kernels.token_loss.linear import linear_nll
from unlearn_kernels.token_loss.losses import grad_diff, npo

__all__ = ["grad_diff", "linear_nll", "npo"]

"""Losses of a language-model head, straight from its hidden states: no logits in memory."""

from unlearn_kernels.token_loss.distances import linear_kl, linear_soft_ce, linear_softplus
from unlearn_kernels.token_loss.linear import linear_nll
from unlearn_kernels.token_loss.losses import grad_diff, npo
from unlearn_kernels.token_loss.statistics import MaxMean, TokenStats, linear_maxmean, linear_stats

__all__ = [
    "MaxMean",
    "TokenStats",
    "grad_diff",
    "linear_kl",
    "linear_maxmean",
    "linear_nll",
    "linear_soft_ce",
    "linear_softplus",
    "linear_stats",
    "npo",
]

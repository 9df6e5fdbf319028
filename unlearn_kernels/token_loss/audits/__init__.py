"""Audits of a language model from one pass over a data set: what it still knows, and whether it was in training."""

from unlearn_kernels.token_loss.audits.attacks import (
    loss_attack,
    min_k,
    min_k_plus_plus,
    reference_attack,
    zlib_attack,
)
from unlearn_kernels.token_loss.audits.memorization import (
    aggregate_truth_ratio,
    exact_memorization,
    extraction_strength,
    probability,
    truth_ratio,
)
from unlearn_kernels.token_loss.audits.removal import (
    Relearning,
    RemovalAudit,
    mean_nll,
    relearned,
    removal_audit,
)
from unlearn_kernels.token_loss.audits.table import TokenTable, token_stats

__all__ = [
    "Relearning",
    "RemovalAudit",
    "TokenTable",
    "aggregate_truth_ratio",
    "exact_memorization",
    "extraction_strength",
    "loss_attack",
    "mean_nll",
    "min_k",
    "min_k_plus_plus",
    "probability",
    "reference_attack",
    "relearned",
    "removal_audit",
    "token_stats",
    "truth_ratio",
    "zlib_attack",
]

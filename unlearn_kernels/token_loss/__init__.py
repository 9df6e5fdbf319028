"""Losses of a language-model head, straight from its hidden states: no logits in memory."""

from unlearn_kernels._files import StoreError
from unlearn_kernels.token_loss.adapters import adapter_off, fingerprint
from unlearn_kernels.token_loss.contrast import flat
from unlearn_kernels.token_loss.distances import linear_kl, linear_soft_ce, linear_softplus
from unlearn_kernels.token_loss.distillation import ceu, kl_retain, pdu, undial
from unlearn_kernels.token_loss.hidden import HiddenRows, hidden_rows
from unlearn_kernels.token_loss.lazy import LazyLogits, lazy_logits
from unlearn_kernels.token_loss.likelihood import grad_ascent, grad_diff, idk, satimp, tnpo, wga, wtnpo
from unlearn_kernels.token_loss.linear import linear_nll
from unlearn_kernels.token_loss.preference import dpo, npo, simnpo
from unlearn_kernels.token_loss.reference_cache import ReferenceCache
from unlearn_kernels.token_loss.representation import control_vector, early_exit, rmu
from unlearn_kernels.token_loss.statistics import MaxMean, TokenStats, linear_maxmean, linear_stats

__all__ = [
    "HiddenRows",
    "LazyLogits",
    "MaxMean",
    "ReferenceCache",
    "StoreError",
    "TokenStats",
    "adapter_off",
    "ceu",
    "control_vector",
    "dpo",
    "early_exit",
    "fingerprint",
    "flat",
    "grad_ascent",
    "grad_diff",
    "hidden_rows",
    "idk",
    "kl_retain",
    "lazy_logits",
    "linear_kl",
    "linear_maxmean",
    "linear_nll",
    "linear_soft_ce",
    "linear_softplus",
    "linear_stats",
    "npo",
    "pdu",
    "rmu",
    "satimp",
    "simnpo",
    "tnpo",
    "undial",
    "wga",
    "wtnpo",
]

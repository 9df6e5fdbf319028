"""Lazy logits: a peer's loss code, unchanged, on operators that never make them."""

from unlearn_kernels.token_loss.lazy import arithmetic, losses, views
from unlearn_kernels.token_loss.lazy.attach import lazy_logits
from unlearn_kernels.token_loss.lazy.handle import LazyLogits

__all__ = ["LazyLogits", "arithmetic", "lazy_logits", "losses", "views"]

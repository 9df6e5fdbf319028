"""Kernels of machine unlearning: per-sample gradients, gradient surgery, influence and token losses."""

from unlearn_kernels import influence, per_sample, surgery, token_loss
from unlearn_kernels._backends import BackendError, use_backend

__version__ = "0.1.0"

__all__ = ["BackendError", "influence", "per_sample", "surgery", "token_loss", "use_backend"]

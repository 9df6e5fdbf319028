"""What is left of right-hand sides once they are solved for."""

import torch
from torch import Tensor


def norms(x: Tensor) -> Tensor:
    """Of each entry of the first dimension, float64."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float64)


def relative(left: Tensor, v: Tensor) -> Tensor:
    """Norms of what is left relative to those of right-hand sides, (Q,) float64; themselves where v is zero."""
    size, scale = norms(left), norms(v)
    return torch.where(scale > 0, size / scale, size)

"""What sums are accumulated in."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, otherwise float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32

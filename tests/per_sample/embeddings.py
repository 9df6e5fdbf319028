"""Inputs of the embedding tests, and the definition by autograd."""

import torch
from torch import Tensor

from unlearn_kernels.testing import randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDE = {dtype: torch.float64 if dtype == torch.float64 else torch.float32 for dtype in DTYPES}


def tokens(
    batch: int, length: int, rows: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Ids, half of them among the first four, and gradients."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (batch, length), generator=generator)
    hot = torch.rand(batch, length, generator=generator) < 0.5
    return torch.where(hot, ids % 4, ids) % rows, randn(batch, length, width, dtype=dtype, seed=seed + 1)


def by_autograd(ids: Tensor, g: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    """One backward a sample through `torch.nn.Embedding`, in float64: (B, V, d)."""
    layer = torch.nn.Embedding(rows, g.shape[-1], padding_idx=padding_idx, dtype=torch.float64)
    found = [torch.autograd.grad(layer(i), layer.weight, u)[0] for i, u in zip(ids, g.double(), strict=True)]
    return torch.stack(found) if found else torch.zeros(0, rows, g.shape[-1], dtype=torch.float64)

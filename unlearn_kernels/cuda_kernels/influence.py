"""Random projections in CUDA C++."""

from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.cuda_kernels.native import run
from unlearn_kernels.triton_kernels.surgery.tables import CODES

_RUN: Final = 2048  # coordinates whose sum is a chain
_MOST_PARTS: Final = 256


def rademacher_project(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    """The raw operator: g (B, dim) -> (B, k), with sums in float32 (float64 for float64) and signs in registers.

    Scratch: `parts * B * k` sums, at most 256 parts of at least 8192 coordinates each.
    """
    batch, dim = g.shape
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    if g.numel() == 0 or k == 0:
        return g.new_zeros(batch, k, dtype=dtype)
    length = -(-max(8192, -(-dim // _MOST_PARTS)) // _RUN) * _RUN
    parts = torch.empty(batch * k, -(-dim // length), dtype=dtype, device=g.device)
    places = None if blocks is None else blocks.contiguous()
    sizes = (batch, dim, k, seed, length, *g.stride())
    run("sign_sums", g.device, g.data_ptr(), CODES[g.dtype], *sizes, places, parts)
    return (parts.sum(1, dtype=torch.float64) / k**0.5).to(dtype).view(batch, k)

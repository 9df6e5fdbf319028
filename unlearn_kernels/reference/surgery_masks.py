"""Masks of the elements of largest magnitude, in plain formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _largest(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Bool masks of the `count` largest `|x|`; NaN after every number, equal ones in order."""
    size = torch.cat([x.detach().double().abs().reshape(-1) for x in tensors])
    order = torch.where(size.isnan(), -1.0, size).argsort(descending=True, stable=True)
    taken = torch.zeros_like(size, dtype=torch.bool)
    taken[order[:count]] = True
    parts = taken.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


def pack(mask: Tensor) -> Tensor:
    """A bool mask as bits: element `i` in bit `i % 8`, the lowest first, of byte `i // 8`; (n / 8,) uint8."""
    flat = mask.reshape(-1)
    padded = torch.cat([flat, flat.new_zeros(-flat.numel() % 8)]).view(-1, 8)
    return (padded.long() << torch.arange(8, device=mask.device)).sum(1).to(torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool mask that `pack` packed."""
    flat = (bits[:, None].long() >> torch.arange(8, device=bits.device) & 1).bool().reshape(-1)
    return flat[: torch.Size(shape).numel()].view(torch.Size(shape))


def topk_mask(tensors: Sequence[Tensor], counts: Sequence[int], by_tensor: bool, bits: bool) -> list[Tensor]:
    """Masks of `counts` elements over all tensors, or of each tensor; tensors of a mask together."""
    if by_tensor:
        n = len(tensors)
        masks = [m for i, k in enumerate(counts) for m in _largest(tensors[i % n : i % n + 1], k)]
    else:
        masks = [m for k in counts for m in _largest(tensors, k)]
    return [pack(m) for m in masks] if bits else masks


def apply_mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """`x = 0` where the mask, bool or bits, is 0."""
    for x, mask in zip(tensors, masks, strict=True):
        x.masked_fill_(~(mask if mask.dtype == torch.bool else unpack(mask, x.shape)), 0)

"""Gradients in 8 bits an element, in plain formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels.reference import surgery

BLOCK = 256  # elements that share a scale


def _blocks(x: Tensor) -> Tensor:
    """(blocks, 256), zeros after the last element."""
    flat = x.reshape(-1)
    return torch.cat([flat, flat.new_zeros(-flat.numel() % BLOCK)]).view(-1, BLOCK)


def compress(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """int8 codes of each tensor's shape, and float32 scales: the largest magnitude of a block by 127, NaN for a
    block that is not finite."""
    codes, scales = [], []
    for x in tensors:
        blocks = _blocks(x.float())
        most = blocks.abs().amax(1) / 127
        scale = torch.where(blocks.isfinite().all(1), most, torch.nan)
        ratio = torch.where(scale[:, None] > 0, blocks / scale[:, None], 0.0)
        codes.append(ratio.clamp(-127, 127).round().to(torch.int8).reshape(-1)[: x.numel()].view(x.shape))
        scales.append(scale)
    return codes, scales


def _decompressed(codes: Tensor, scales: Tensor) -> Tensor:
    return (_blocks(codes.float()) * scales[:, None].float()).reshape(-1)[: codes.numel()].view(codes.shape)


def decompress_(out: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """`out = scale * code`, rounded to float32 and then to the dtype of `out`."""
    for x, c, s in zip(out, codes, scales, strict=True):
        x.copy_(_decompressed(c, s))


def project_conflict_compressed_(
    forget: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """`project_conflict_` by A-GEM with the retain gradient that the codes stand for."""
    retain = [_decompressed(c, s) for c, s in zip(codes, scales, strict=True)]
    tensors = [*forget, *retain]
    G = surgery.gramian(tensors, 2)
    weights = surgery.agem_weights(G)
    if weights[1] != 0:
        surgery.combine_(forget, tensors, weights)
    return G, weights

"""Surgery in plain PyTorch, the ways that training code writes it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def project_by_dots(forget: list[Tensor], retain: list[Tensor]) -> None:
    """f -= min(0, <f, r>) / |r|² r, with a `torch.dot` per tensor."""
    fr = sum(torch.dot(a.view(-1), b.view(-1)) for a, b in zip(forget, retain, strict=True))
    rr = sum(torch.dot(b.view(-1), b.view(-1)) for b in retain)
    _subtract(forget, retain, fr, rr)


def project_by_foreach(forget: list[Tensor], retain: list[Tensor]) -> None:
    """The same with multi-tensor operators; the products are a temporary as large as a set."""
    fr = torch.stack([product.sum() for product in torch._foreach_mul(forget, retain)]).sum()
    rr = torch.stack(torch._foreach_norm(retain)).square().sum()
    _subtract(forget, retain, fr, rr)


def _subtract(forget: list[Tensor], retain: list[Tensor], fr: Tensor | int, rr: Tensor | int) -> None:
    if fr < 0:
        torch._foreach_add_(forget, retain, alpha=-float(fr / rr))


def project_flat(forget: Tensor, retain: Tensor) -> Tensor:
    """The same on flat vectors, for a compiler to fuse."""
    fr = (forget * retain).sum(dtype=torch.float32)
    rr = retain.square().sum(dtype=torch.float32)
    return forget - (fr.clamp(max=0) / rr).to(forget.dtype) * retain


def gramian_by_foreach(sets: Sequence[list[Tensor]]) -> Tensor:
    """All inner products, one multi-tensor product per pair of sets."""
    K = len(sets)
    found = torch.empty(K, K)
    for i in range(K):
        for j in range(i + 1):
            products = torch._foreach_mul(sets[i], sets[j])
            found[i, j] = found[j, i] = torch.stack([p.sum() for p in products]).sum()
    return found


def gramian_of_stacks(stacks: list[Tensor]) -> Tensor:
    """All inner products from (K, n) matrices."""
    return torch.stack([stack @ stack.T for stack in stacks]).sum(0)


def combine_by_foreach_(sets: Sequence[list[Tensor]], weights: list[float]) -> None:
    """Σ_k w_k g_k into the first set."""
    torch._foreach_mul_(sets[0], weights[0])
    for weight, group in zip(weights[1:], sets[1:], strict=True):
        torch._foreach_add_(sets[0], group, alpha=weight)


def _blocks(x: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % 256)).view(-1, 256)


def compress(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """int8 codes and a float32 scale for every 256 elements."""
    codes, scales = [], []
    for x in tensors:
        blocks = _blocks(x.float())
        scale = blocks.abs().amax(1, keepdim=True) / 127
        rounded = (blocks / scale.clamp(min=1e-30)).round().to(torch.int8)
        codes.append(rounded.reshape(-1)[: x.numel()].view(x.shape))
        scales.append(scale)
    return codes, scales


def decompressed(codes: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """The float32 tensors that they stand for."""
    return [
        (_blocks(code) * scale).reshape(-1)[: code.numel()].view(code.shape)
        for code, scale in zip(codes, scales, strict=True)
    ]

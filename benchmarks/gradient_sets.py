"""Gradient sets shaped like the parameters of real models, and the float64 truth about combining them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Shapes = tuple[tuple[int, ...], ...]


def gpt2(vocabulary: int = 50257, width: int = 768, layers: int = 12, context: int = 1024) -> Shapes:
    """The parameters of GPT-2: 148 tensors, 124.4 M elements at its published size."""
    block = (
        *((width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)),
        *((width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)),
    )
    return ((vocabulary, width), (context, width), *(block * layers), (width,), (width,))


def gpt2_half() -> Shapes:
    """Half the layers and half the vocabulary: 76 tensors, 62.6 M elements, four sets of which fit in 2 GB."""
    return gpt2(vocabulary=25128, layers=6)


def lora(width: int = 4096, hidden: int = 11008, layers: int = 32, rank: int = 16) -> Shapes:
    """LoRA factors on the seven linear layers of a Llama-2: 448 tensors, 40.0 M elements for the 7B."""
    into_out = [(width, width)] * 4 + [(width, hidden)] * 2 + [(hidden, width)]
    return tuple(s for d, p in into_out for s in ((rank, d), (p, rank))) * layers


def sd15_kv() -> Shapes:
    """Keys and values of the cross-attention of Stable Diffusion 1.5: 32 tensors, 19.2 M elements."""
    widths = [320] * 10 + [640] * 10 + [1280] * 12
    return tuple((width, 768) for width in widths)


def elements(shapes: Shapes) -> int:
    """How many numbers a set of these shapes has."""
    return sum(torch.Size(shape).numel() for shape in shapes)


@dataclass
class Sets:
    """K gradient sets; every set after the first conflicts with it."""

    sets: list[list[Tensor]]

    @cached_property
    def work(self) -> list[Tensor]:
        """A copy of the first set, for methods that write in place."""
        return [t.clone() for t in self.sets[0]]

    @cached_property
    def stacks(self) -> list[Tensor]:
        """The sets as a (K, *shape) tensor per parameter."""
        return [torch.stack(group) for group in zip(*self.sets, strict=True)]

    @property
    def in_place(self) -> list[list[Tensor]]:
        """The sets with the working copy in the first place."""
        return [self.work, *self.sets[1:]]

    def restore(self) -> None:
        """Undo what an in-place method did to the working copy."""
        torch._foreach_copy_(self.work, self.sets[0])


def make(shapes: Shapes, K: int, dtype: torch.dtype) -> Callable[[str], Sets]:
    """A maker of K sets on a device: normal numbers; sets after the first have 0.3 of the first taken off."""

    def draw(generator: torch.Generator, base: list[Tensor] | None) -> list[Tensor]:
        device = generator.device
        tensors = [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        if base:
            torch._foreach_add_(tensors, base, alpha=-0.3)
        return tensors

    def on(device: str) -> Sets:
        generator = torch.Generator(device).manual_seed(0)
        first = draw(generator, None)
        sets = [first, *(draw(generator, first) for _ in range(K - 1))]
        return Sets([[t.to(dtype) for t in group] for group in sets])

    return on


def gramian(inputs: Sets) -> Tensor:
    """The inner products in float64."""
    K = len(inputs.sets)
    total = torch.zeros(K, K, dtype=torch.float64)
    for group in zip(*inputs.sets, strict=True):
        rows = torch.stack([t.flatten().double() for t in group])
        total += (rows @ rows.T).cpu()
    return total


def deviation(inputs: Sets, result: list[Tensor], weights: Tensor) -> float:
    """How far a result is from Σ_k w_k g_k, relative, in the norm of the whole list."""
    off = size = 0.0
    for got, *group in zip(result, *inputs.sets, strict=True):
        expected = torch.zeros_like(got, dtype=torch.float64)
        for weight, tensor in zip(weights.tolist(), group, strict=True):
            expected.add_(tensor.double(), alpha=weight)
        size += float(expected.square().sum())
        off += float(expected.sub_(got.double()).square_().sum())
    return (off / size) ** 0.5 if off == off else float("inf")

"""Convolutions, and transposed ones, whose weight gradient is a convolution's with the two factors swapped."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import conv
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.per_sample.modules.layer import Kept, Layer, only
from unlearn_kernels.per_sample.modules.linear import bias_use
from unlearn_kernels.per_sample.modules.use import Use


class ConvUse(Use):
    """The weight gradients of a convolution, kept as its input A (B, C, *spatial) and G (B, O, *out)."""

    def __init__(self, A: Tensor, G: Tensor, shape: dict[str, Any]) -> None:
        self.A, self.G, self.shape = A, G, shape

    @property
    def samples(self) -> int:
        return self.A.shape[0]

    @property
    def device(self) -> torch.device:
        return self.A.device

    def sqnorms(self) -> Tensor:
        return conv.sqnorms(self.A, self.G, **self.shape)

    def grads(self) -> Tensor:
        return conv.grads(self.A, self.G, **self.shape).weight

    def rows(self, part: slice) -> Use:
        return ConvUse(self.A[part], self.G[part], self.shape)

    def weighted_sum(self, w: Tensor) -> Tensor:
        return conv.weighted_sum(self.A, self.G, w, **self.shape).weight

    def project(self, projection: Projection | TwoSided) -> Tensor:
        return conv.project(self.A, self.G, projection, **self.shape)

    def dots(self, other: Use, summed: bool) -> Tensor:
        if not isinstance(other, ConvUse) or other.shape != self.shape:
            return super().dots(other, summed)
        return conv.dots(self.A, self.G, other.A, other.G, summed=summed, **self.shape)


_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ConvLayer(Layer):
    """`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`, with any padding mode."""

    kind = "conv"
    flexible = False

    def __init__(self, path: str, module: _Conv, wanted: frozenset[str]) -> None:
        super().__init__(path, module, wanted)
        self.mode = module.padding_mode
        # Zeros are the kernel's own; whatever else surrounds the input is put there.
        self.pad = None if self.mode == "zeros" else list(module._reversed_padding_repeated_twice)
        self.shape: dict[str, Any] = {
            "kernel_size": module.kernel_size,
            "stride": module.stride,
            "padding": module.padding if self.pad is None else 0,
            "dilation": module.dilation,
            "groups": module.groups,
        }

    def check(self, kept: tuple[Tensor, ...], output: Tensor) -> None:
        if kept[0].dim() != len(self.shape["kernel_size"]) + 2:
            raise ValueError(f"{self.path}: the input has no batch dimension, {tuple(kept[0].shape)}")

    def factors(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors that the weight's gradient is a product of."""
        return (A if self.pad is None else F.pad(A, self.pad, mode=self.mode)), G

    def uses(self, kept: Kept, grads: tuple[Tensor | None, ...]) -> dict[str, Use]:
        grad = only(grads)
        found: dict[str, Use] = {}
        if "weight" in self.wanted:
            found["weight"] = ConvUse(*self.factors(kept.tensors[0], grad), self.shape)
        if "bias" in self.wanted:
            found["bias"] = bias_use(grad, features=1)
        return found


class TransposedConvLayer(ConvLayer):
    """`nn.ConvTranspose1d` and its kin: the output's gradient is convolved, the input is what it meets."""

    def factors(self, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
        return G, A

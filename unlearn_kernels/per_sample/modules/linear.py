"""Linear layers, with the weight as (p, d), and HF `Conv1D`, with (d, p)."""

from typing import Any

import torch
from torch import Tensor, nn

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import _factors, linear
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.per_sample.modules.layer import Kept, Layer, only
from unlearn_kernels.per_sample.modules.use import Dense, Use, widened


class LinearUse(Use):
    """`W_i = G_i^T A_i`, kept as (A, G), both (B, T, features). A transposed weight swaps the two."""

    def __init__(self, A: Tensor, G: Tensor) -> None:
        self.A, self.G = A, G

    @property
    def samples(self) -> int:
        return self.A.shape[0]

    @property
    def device(self) -> torch.device:
        return self.A.device

    def sqnorms(self) -> Tensor:
        return linear.sqnorms(self.A, self.G)

    def grads(self) -> Tensor:
        return linear.grads(self.A, self.G).weight

    def rows(self, part: slice) -> Use:
        return LinearUse(self.A[part], self.G[part])

    def weighted_sum(self, w: Tensor) -> Tensor:
        return linear.weighted_sum(self.A, self.G, w).weight

    def project(self, projection: Projection | TwoSided) -> Tensor:
        return linear.project(self.A, self.G, projection)

    def project_part(self, projection: Projection, offset: int) -> Tensor:
        return _factors.project_part(self.A, self.G, projection, offset)

    def joined(self, other: Use) -> Use | None:
        if not isinstance(other, LinearUse):
            return None
        return LinearUse(torch.cat([self.A, other.A], dim=1), torch.cat([self.G, other.G], dim=1))

    def known_dots(self, other: Use, summed: bool) -> Tensor | None:
        if not isinstance(other, LinearUse):
            return None
        return linear.dots(self.A, self.G, other.A, other.G, summed=summed)


def bias_use(G: Tensor, features: int = -1) -> Dense:
    """The bias's gradients, `sum_t g_t`, (B, p), with the features in dimension `features`."""
    G = G.movedim(features, -1)
    inner = list(range(1, G.dim() - 1))
    return Dense(widened(G.sum(inner, dtype=widened(G[:0]).dtype)) if inner else widened(G))


def flat(x: Tensor) -> Tensor:
    """(B, ..., features) as (B, T, features)."""
    if x.dim() == 3:
        return x
    return x.reshape(x.shape[0], 1 if x.dim() == 2 else x.shape[1:-1].numel(), x.shape[-1])


class LinearLayer(Layer):
    """`nn.Linear`."""

    kind = "linear"
    transposed = False

    def __init__(self, path: str, module: nn.Module, wanted: frozenset[str]) -> None:
        super().__init__(path, module, wanted)
        assert isinstance(module.weight, Tensor)
        self.shape = tuple(module.weight.shape)

    def localise(self) -> str | None:
        weight: Any = self.module.weight
        self.shape = tuple(getattr(weight, "_local_tensor", weight).shape)
        return None

    def check(self, kept: tuple[Tensor, ...], output: Tensor) -> None:
        (A,) = kept
        p, d = reversed(self.shape) if self.transposed else self.shape
        if A.shape[-1] != d or output.shape[-1] != p:
            shapes = f"inputs {tuple(A.shape)} and outputs {tuple(output.shape)}"
            raise ValueError(f"{self.path}: a weight from {d} to {p} features does not go with {shapes}")

    def uses(self, kept: Kept, grads: tuple[Tensor | None, ...]) -> dict[str, Use]:
        grad = only(grads)
        A, G = flat(kept.tensors[0]), flat(grad)
        found: dict[str, Use] = {}
        if "weight" in self.wanted:
            found["weight"] = LinearUse(G, A) if self.transposed else LinearUse(A, G)
        if "bias" in self.wanted:
            found["bias"] = bias_use(grad)
        return found


class TransposedLinearLayer(LinearLayer):
    """HF `Conv1D`: a linear layer whose weight is (d, p)."""

    transposed = True

"""A parameter's per-sample gradients through one use of its module, in whatever form makes the verbs cheap."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.reference.dtypes import accumulation_dtype

AT_ONCE: Final = 1 << 22  # elements of gradients


class Use(ABC):
    """Per-sample gradients of one parameter: the five verbs, and how two uses of it add up."""

    @property
    @abstractmethod
    def samples(self) -> int:
        """How many samples there are."""

    @abstractmethod
    def sqnorms(self) -> Tensor:
        """Squared norms, (B,)."""

    @abstractmethod
    def grads(self) -> Tensor:
        """The gradients themselves, (B, *shape)."""

    @abstractmethod
    def rows(self, part: slice) -> "Use":
        """The same for some of the samples."""

    @abstractmethod
    def weighted_sum(self, w: Tensor) -> Tensor:
        """`sum_i w_i g_i`, of the parameter's shape."""

    @abstractmethod
    def project(self, projection: Projection | TwoSided) -> Tensor:
        """The projected gradients, (B, k)."""

    def project_part(self, projection: Projection, offset: int) -> Tensor:
        """What a parameter that begins at coordinate `offset` of a flattened model adds to a projection, (B, k)."""
        size = self.rows(slice(0, 1)).grads().numel() if self.samples else 1
        step = max(1, AT_ONCE // max(size, 1))
        starts = range(0, max(self.samples, 1), step)
        parts = (self.rows(slice(i, i + step)).grads().flatten(1) for i in starts)
        return torch.cat([projection.project_part(g, offset) for g in parts])

    def joined(self, other: "Use") -> "Use | None":
        """One use whose gradients are the sums of both, sample by sample, or None."""
        return None

    def known_dots(self, other: "Use", summed: bool) -> Tensor | None:
        """Inner products as `dots` has them, if there is a way without gradients."""
        return None

    def known_pairs(self, other: "Use") -> Tensor | None:
        """Inner products as `pairs` has them, if there is a way without gradients."""
        return None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its tensors are."""

    def each(self) -> Iterator[Tensor]:
        """One sample's gradient after the other."""
        return (self.rows(slice(i, i + 1)).grads()[0] for i in range(self.samples))


def dots(one: Use, other: Use, summed: bool) -> Tensor:
    """Inner products of every sample of `one` with every sample of `other`, (B1, B2), or with their sum, (B1,)."""
    found = one.known_dots(other, summed)
    if found is not None:
        return found
    turned = other.known_dots(one, False)
    if turned is not None:
        return turned.sum(0) if summed else turned.T
    if summed:
        total = other.weighted_sum(torch.ones(other.samples, device=other.device))
        return torch.stack([_dot(row, total) for row in one.each()])
    return torch.stack([torch.stack([_dot(x, y) for y in other.each()]) for x in one.each()])


def pairs(one: Use, other: Use) -> Tensor:
    """Inner products of sample i of `one` with sample i of `other`, (B,). One sample's gradients in memory at most."""
    for a, b in ((one, other), (other, one)):
        found = a.known_pairs(b)
        if found is not None:
            return found
    return torch.stack([_dot(x, y) for x, y in zip(one.each(), other.each(), strict=True)])


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return torch.dot(x.flatten(), y.flatten().to(x.dtype))


def project_dense(grads: Tensor, projection: Projection | TwoSided) -> Tensor:
    """Gradients that are in memory, projected."""
    if isinstance(projection, TwoSided):
        if grads.dim() != 3:
            raise ValueError(
                f"a TwoSided projection takes matrices, the gradients have shape {tuple(grads.shape)}"
            )
        left, right = projection.left.to(grads.dtype), projection.right.to(grads.dtype)
        return (left @ grads @ right.T).flatten(1)
    return projection.project(grads.flatten(1))


class Dense(Use):
    """Gradients that are small enough to be kept: of biases and scales, and of the exact fallback."""

    def __init__(self, grads: Tensor) -> None:
        self.values = grads

    @property
    def samples(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def sqnorms(self) -> Tensor:
        return self.values.flatten(1).square().sum(1)

    def grads(self) -> Tensor:
        return self.values

    def rows(self, part: slice) -> Use:
        return Dense(self.values[part])

    def weighted_sum(self, w: Tensor) -> Tensor:
        return torch.tensordot(w.to(self.values.dtype), self.values, 1)

    def project(self, projection: Projection | TwoSided) -> Tensor:
        return project_dense(self.values, projection)

    def project_part(self, projection: Projection, offset: int) -> Tensor:
        return projection.project_part(self.values.flatten(1), offset)

    def joined(self, other: Use) -> Use | None:
        return Dense(self.values + other.values) if isinstance(other, Dense) else None

    def known_dots(self, other: Use, summed: bool) -> Tensor | None:
        if not isinstance(other, Dense):
            return None
        theirs = other.values.flatten(1).to(self.values.dtype)
        return self.values.flatten(1) @ (theirs.sum(0) if summed else theirs.T)


class Summed(Use):
    """Several uses of one parameter that no single form covers: a weight tied between an embedding and a head."""

    def __init__(self, parts: Sequence[Use]) -> None:
        self.parts = list(parts)

    @property
    def samples(self) -> int:
        return self.parts[0].samples

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    def sqnorms(self) -> Tensor:
        total = sum_of([part.sqnorms() for part in self.parts])
        return total + 2 * sum_of([pairs(a, b) for a, b in combinations(self.parts, 2)])

    def grads(self) -> Tensor:
        return sum_of([part.grads() for part in self.parts])

    def rows(self, part: slice) -> Use:
        return Summed([one.rows(part) for one in self.parts])

    def weighted_sum(self, w: Tensor) -> Tensor:
        return sum_of([part.weighted_sum(w) for part in self.parts])

    def project(self, projection: Projection | TwoSided) -> Tensor:
        return sum_of([part.project(projection) for part in self.parts])

    def project_part(self, projection: Projection, offset: int) -> Tensor:
        return sum_of([part.project_part(projection, offset) for part in self.parts])

    def known_dots(self, other: Use, summed: bool) -> Tensor | None:
        theirs = other.parts if isinstance(other, Summed) else [other]
        return sum_of([dots(a, b, summed) for a in self.parts for b in theirs])


class NormsOnly(Use):
    """Squared norms, when nothing else was kept."""

    def __init__(self, sqnorms: Tensor) -> None:
        self.values = sqnorms

    @property
    def samples(self) -> int:
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    def sqnorms(self) -> Tensor:
        return self.values

    def _missing(self) -> RuntimeError:
        return RuntimeError(
            "only norms were kept (keep='norms'): this needs PerSampleGradients(..., keep='factors')"
        )

    def grads(self) -> Tensor:
        raise self._missing()

    def rows(self, part: slice) -> Use:
        raise self._missing()

    def weighted_sum(self, w: Tensor) -> Tensor:
        raise self._missing()

    def project(self, projection: Projection | TwoSided) -> Tensor:
        raise self._missing()

    def project_part(self, projection: Projection, offset: int) -> Tensor:
        raise self._missing()

    def known_dots(self, other: Use, summed: bool) -> Tensor | None:
        raise self._missing()


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Their sum, in the widest of their dtypes."""
    total = tensors[0]
    for x in tensors[1:]:
        total = total + x
    return total


def combined(uses: Sequence[Use]) -> Use:
    """One use that stands for all: joined where the forms allow, summed with cross terms where not."""
    parts: list[Use] = []
    for use in uses:
        for at, part in enumerate(parts):
            both = part.joined(use)
            if both is not None:
                parts[at] = both
                break
        else:
            parts.append(use)
    return parts[0] if len(parts) == 1 else Summed(parts)


def widened(x: Tensor) -> Tensor:
    """In the dtype that sums of it are taken in."""
    return x.to(accumulation_dtype(x))

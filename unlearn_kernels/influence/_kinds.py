"""What each kind of projection does with a range of coordinates and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final, Protocol

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend, select
from unlearn_kernels.influence import _sketch_ops  # noqa: F401  registers the operators
from unlearn_kernels.reference import influence as signs
from unlearn_kernels.reference import sketches
from unlearn_kernels.reference.dtypes import accumulation_dtype

RIGHT_SIDE = 1 << 62  # changes the seed
_AT_ONCE: Final = 1 << 20  # elements of a temporary of `TwoSides`


class Kind(Protocol):
    """Coordinates offset ... offset + n - 1 of a gradient to `k` numbers, and the transpose of that.

    `align` is what an offset must be a multiple of.
    """

    align: ClassVar[int]

    def project(self, g: Tensor, offset: int, backend: Backend | None) -> Tensor:
        """g (B, n) -> (B, k)."""
        ...

    def adjoint(self, y: Tensor, size: int, offset: int, backend: Backend | None) -> Tensor:
        """y (B, k) -> (B, size)."""
        ...


@dataclass(frozen=True)
class Rademacher:
    """Independent signs."""

    k: int
    seed: int
    align: ClassVar[int] = signs.SIGNS_A_CALL

    def project(self, g: Tensor, offset: int, backend: Backend | None) -> Tensor:
        """g (B, n) -> (B, k)."""
        first = offset // self.align
        count = -(-g.shape[1] // self.align)
        blocks = torch.arange(first, first + count, device=g.device) if first else None
        return select("rademacher_project", backend, (g,))(g, self.k, self.seed, blocks)

    def adjoint(self, y: Tensor, size: int, offset: int, backend: Backend | None) -> Tensor:
        """y (B, k) -> (B, size)."""
        return select("dense_adjoint", backend, (y,))(y, size, self.seed, offset, False)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers."""

    k: int
    seed: int
    align: ClassVar[int] = sketches.NORMALS_A_CALL

    def project(self, g: Tensor, offset: int, backend: Backend | None) -> Tensor:
        """g (B, n) -> (B, k)."""
        return select("normal_project", backend, (g,))(g, self.k, self.seed, offset)

    def adjoint(self, y: Tensor, size: int, offset: int, backend: Backend | None) -> Tensor:
        """y (B, k) -> (B, size)."""
        return select("dense_adjoint", backend, (y,))(y, size, self.seed, offset, True)


@dataclass(frozen=True)
class Sparse:
    """A sign in one row of each of `terms` shares; with `inner` > 0, the sides of a matrix hashed apart."""

    k: int
    terms: int
    seed: int
    inner: int = 0
    align: ClassVar[int] = sketches.TERMS_A_CALL

    def project(self, g: Tensor, offset: int, backend: Backend | None) -> Tensor:
        """g (B, n) -> (B, k)."""
        call = select("sparse_project", backend, (g,))
        return call(g, self.k, self.terms, self.seed, offset, self.inner)

    def adjoint(self, y: Tensor, size: int, offset: int, backend: Backend | None) -> Tensor:
        """y (B, k) -> (B, size)."""
        return sketches.sparse_adjoint(y, size, self.terms, self.seed, offset, self.inner)


@dataclass(frozen=True)
class Hadamard:
    """Rows of a Hadamard matrix of 2^bits columns with random signs."""

    k: int
    bits: int
    seed: int
    align: ClassVar[int] = sketches.HADAMARD_BLOCK

    @cached_property
    def _rows(self) -> Tensor:
        return sketches.hadamard_rows(self.k, self.bits, self.seed)

    def rows(self, device: torch.device) -> Tensor:
        """The rows that are taken."""
        return self._rows.to(device)

    def project(self, g: Tensor, offset: int, backend: Backend | None) -> Tensor:
        """g (B, n) -> (B, k)."""
        return select("hadamard_project", backend, (g,))(g, self.rows(g.device), self.seed, offset)

    def adjoint(self, y: Tensor, size: int, offset: int, backend: Backend | None) -> Tensor:
        """y (B, k) -> (B, size)."""
        return sketches.hadamard_adjoint(y, self.rows(y.device), size, self.seed, offset)


@dataclass(frozen=True)
class TwoSides:
    """A matrix gradient of shape (p, d) between two matrices of signs."""

    sides: tuple[int, int]
    shape: tuple[int, int]
    seed: int
    align: ClassVar[int] = 1

    @cached_property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """Left (k_o, p) and right (k_i, d), float32, scaled."""
        seeds = self.seed, self.seed ^ RIGHT_SIDE
        left, right = (_scaled_signs(*each) for each in zip(self.sides, self.shape, seeds, strict=True))
        return left, right

    def _of(self, first: int, last: int, like: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (x.to(like.device, accumulation_dtype(like)) for x in self.matrices)
        return left[:, first:last], right

    def project(self, g: Tensor, offset: int, backend: Backend | None) -> Tensor:
        """g (B, n) -> (B, k)."""
        d, end = self.shape[1], offset + g.shape[1]
        first, last = offset // d, -(-end // d)
        left, right = self._of(first, last, g)
        step = max(1, _AT_ONCE // max(len(g) * d, 1))
        inner = [
            self._rows(g, offset, row, min(row + step, last)).to(right.dtype) @ right.T
            for row in range(first, last, step)
        ] or [g.new_zeros(len(g), 0, self.sides[1], dtype=right.dtype)]
        return (left @ torch.cat(inner, 1)).flatten(1)

    def _rows(self, g: Tensor, offset: int, first: int, last: int) -> Tensor:
        """Rows first ... last - 1 of the matrices, (B, last - first, d), zero where `g` does not reach."""
        d, end = self.shape[1], offset + g.shape[1]
        part = g[:, max(first * d - offset, 0) : last * d - offset]
        missing = max(offset - first * d, 0), max(last * d - end, 0)
        whole = torch.nn.functional.pad(part, missing) if any(missing) else part
        return whole.unflatten(1, (last - first, d))

    def adjoint(self, y: Tensor, size: int, offset: int, backend: Backend | None) -> Tensor:
        """y (B, k) -> (B, size)."""
        d, end = self.shape[1], offset + size
        first, last = offset // d, -(-end // d)
        left, right = self._of(first, last, y)
        rows = left.T @ y.unflatten(1, self.sides).to(right.dtype) @ right
        return rows.flatten(1)[:, offset - first * d : end - first * d]


def _scaled_signs(k: int, size: int, seed: int) -> Tensor:
    """Signs over `sqrt(k)`, (k, size), made some columns at a time: they are int64 on the way."""
    rows, out = torch.arange(k), torch.empty(k, size)
    for part in torch.arange(size).split(max(1, _AT_ONCE // k)):
        out[:, part[0] : part[-1] + 1] = signs.rademacher_signs(rows, part, seed)
    return out.div_(k**0.5)


def aligned(g: Tensor, offset: int, align: int) -> Iterator[tuple[Tensor, int]]:
    """Parts of `g` (B, n) that begin at multiples of `align`: a small first one padded with zeros, then the rest."""
    before = offset % align
    if before:
        head = min(align - before, g.shape[1])
        yield torch.nn.functional.pad(g[:, :head], (before, 0)), offset - before
        g, offset = g[:, head:], offset + head
    if g.shape[1] or not before:
        yield g, offset

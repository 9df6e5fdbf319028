r"""Random projections without a matrix: `y = g P^T` with `P` made while it is used."""

from typing import Final, Literal

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend, select
from unlearn_kernels.influence._kinds import Gaussian, Hadamard, Kind, Rademacher, Sparse, TwoSides, aligned
from unlearn_kernels.reference import influence as reference
from unlearn_kernels.reference.dtypes import accumulation_dtype

Name = Literal["rademacher", "gaussian", "sjlt", "srht", "two_sided", "tensorsketch"]
_NAMES: Final = ("rademacher", "gaussian", "sjlt", "srht", "two_sided", "tensorsketch")
_MOST: Final = {"dim": 1 << 39, "k": 1 << 32, "seed": (1 << 63) - 1}


class Projection:
    r"""A random projection from `dim` coordinates to `k` that keeps inner products: `E[<P g, P h>] = <g, h>`.

    No part of `P` is ever in memory, beyond what a block needs. Its entries come from Philox4x32-10 keyed by `seed`:
    the same on every device and backend, for every batch and thread count. `docs/influence.md` has the layout of
    each kind, its variance and when to take which.

    * `rademacher`: independent signs; `gaussian`: independent normal numbers. For both a projection to fewer outputs,
      or from fewer coordinates, uses a corner of the same matrix.
    * `sjlt`: every coordinate goes, with a sign, to one output in each of `terms` equal shares (1: CountSketch).
    * `srht`: `k` different rows of a Walsh-Hadamard matrix, random signs before it.
    * `two_sided`: `L G R^T` of a matrix gradient, two small matrices of signs (LoGra).
    * `tensorsketch`: CountSketch of a matrix gradient whose rows and columns are hashed apart, so that a sum of outer
      products is projected from its factors (`per_sample.linear.project`).

    Args:
        dim: coordinates of a gradient, at most 2^39.
        k: coordinates of a projection, at most 2^32 for `rademacher`, 2^31 for the others. A power of two for
            `tensorsketch`; for `srht` no more than the power of two that covers `dim`.
        kind: the distribution of `P`.
        seed: at least 0, less than 2^63 (2^62 for `two_sided`).
        terms: of `sjlt`, at most `k`.
        shape: (p, d) of the matrix gradient, `p d = dim`; of `two_sided` and `tensorsketch`.
        sides: (k_o, k_i) of `two_sided`, `k_o k_i = k`.

    Raises:
        ValueError: if a number is out of range, `kind` is unknown, or an argument of another kind is given.

    Sources: Achlioptas 2003 for signs; Kane and Nelson 2014 (arXiv 1012.1577) for `sjlt`; Ailon and Chazelle 2009,
    Tropp 2011 (arXiv 1011.1595) for `srht`; Choe et al. 2024 (arXiv 2405.13954) for `two_sided`; Pham and Pagh 2013
    for `tensorsketch`; their use on gradients: Park et al. 2023 (TRAK, arXiv 2303.14186).
    """

    def __init__(
        self,
        dim: int,
        k: int,
        kind: Name = "rademacher",
        seed: int = 0,
        *,
        terms: int | None = None,
        shape: tuple[int, int] | None = None,
        sides: tuple[int, int] | None = None,
    ) -> None:
        if kind not in _NAMES:
            raise ValueError(f"kind must be one of {', '.join(_NAMES)}, got {kind!r}")
        for name, value, least in (("dim", dim, 1), ("k", k, 1), ("seed", seed, 0)):
            if not least <= value <= _MOST[name]:
                raise ValueError(f"{name} must be between {least} and {_MOST[name]}, got {value}")
        if kind != "rademacher" and k > 1 << 31:
            raise ValueError(f"k must be at most 2^31 for kind {kind!r}, got {k}")
        self.dim, self.k, self.kind, self.seed = dim, k, kind, seed
        self.terms, self.shape, self.sides = terms, shape, sides
        self._kind = self._made()

    def _made(self) -> Kind:
        kind = self.kind
        self._needs("terms", self.terms, kind == "sjlt", optional=True)
        self._needs("shape", self.shape, kind in ("two_sided", "tensorsketch"))
        self._needs("sides", self.sides, kind == "two_sided")
        if self.shape is not None and (min(self.shape) < 1 or self.shape[0] * self.shape[1] != self.dim):
            raise ValueError(f"shape must have a product of {self.dim}, got {self.shape}")
        if kind == "rademacher":
            return Rademacher(self.k, self.seed)
        if kind == "gaussian":
            return Gaussian(self.k, self.seed)
        if kind == "sjlt":
            return self._sjlt()
        if kind == "srht":
            return self._srht()
        return self._of_matrix()

    def _needs(self, name: str, value: object, wanted: bool, *, optional: bool = False) -> None:
        if value is not None and not wanted:
            raise ValueError(f"{name} must be None for kind {self.kind!r}, got {value}")
        if value is None and wanted and not optional:
            raise ValueError(f"{name} must be given for kind {self.kind!r}")

    def _sjlt(self) -> Kind:
        self.terms = 1 if self.terms is None else self.terms
        if not 1 <= self.terms <= self.k:
            raise ValueError(f"terms must be between 1 and k = {self.k}, got {self.terms}")
        return Sparse(self.k, self.terms, self.seed)

    def _srht(self) -> Kind:
        bits = (self.dim - 1).bit_length()
        if self.k > 1 << bits:
            raise ValueError(
                f"k must be at most {1 << bits} for kind 'srht' and dim {self.dim}, got {self.k}"
            )
        return Hadamard(self.k, bits, self.seed)

    def _of_matrix(self) -> Kind:
        assert self.shape is not None
        if self.kind == "tensorsketch":
            if self.k & (self.k - 1):
                raise ValueError(f"k must be a power of two for kind 'tensorsketch', got {self.k}")
            return Sparse(self.k, 1, self.seed, self.shape[1])
        assert self.sides is not None
        if min(self.sides) < 1 or self.sides[0] * self.sides[1] != self.k:
            raise ValueError(f"sides must have a product of k = {self.k}, got {self.sides}")
        if self.seed >= 1 << 62:
            raise ValueError(f"seed must be less than 2^62 for kind 'two_sided', got {self.seed}")
        return TwoSides(self.sides, self.shape, self.seed)

    def __repr__(self) -> str:
        given = {"terms": self.terms, "shape": self.shape, "sides": self.sides}
        more = "".join(f", {name}={value}" for name, value in given.items() if value is not None)
        return f"Projection(dim={self.dim}, k={self.k}, kind={self.kind!r}, seed={self.seed}{more})"

    def __call__(self, g: Tensor) -> Tensor:
        """Do the same as `project(g)`."""
        return self.project(g)

    def project(self, g: Tensor, *, backend: Backend | None = None) -> Tensor:
        r"""Return `g P^T`, the scale (`1 / \sqrt k` for dense kinds) included.

        Args:
            g: gradients, (..., dim), float32, float64, bfloat16 or float16, any strides.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            (..., k), float32 (float64 for float64). On the CPU the bits of a row are the same whatever rows
            are beside it and at every thread count, and with `rademacher` for all but float64 on every
            instruction set.

        Raises:
            ValueError: if the last dimension of `g` is not `dim`, it is no floating-point tensor, or it
                requires grad: there is no backward.

        Scratch on the CPU: at most 0.5 MB a thread for dense kinds, whatever dim, k and the batch; `96 B * k / terms`
        and 32 KB for `sjlt`; 32 KB and `8 B * k` for `srht`; two matrices of signs, `2 B p k_i` and 4 MB (or a row of
        each matrix) for `two_sided`. Sums are kept in float for some thousand coordinates at a time and in double
        above that.
        """
        if g.dim() == 0 or g.shape[-1] != self.dim:
            raise ValueError(f"g must have {self.dim} as its last dimension, got shape {tuple(g.shape)}")
        self._check("g", g)
        flat = g if g.dim() == 2 else g.reshape(g.shape[:-1].numel(), self.dim)
        y = self._kind.project(flat, 0, backend)
        return y.reshape(*g.shape[:-1], self.k)

    def project_part(self, g: Tensor, offset: int, *, backend: Backend | None = None) -> Tensor:
        r"""Return what a range of coordinates adds to the projection: the parts of a gradient sum up to `project`.

        Args:
            g: coordinates offset ... offset + n - 1, (B, n).
            offset: where they begin, at least 0; `offset + n` at most `dim`.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            (B, k), float32 (float64 for float64).

        Raises:
            ValueError: as `project`, or if the range is not within `dim`.

        Scratch: that of `project`, and where `offset` is no multiple of a block (128 signs, 8 normal numbers, 4 of
        `sjlt`, 4096 of `srht`) a copy of the coordinates up to the next.
        """
        if g.dim() != 2 or not 0 <= offset <= offset + g.shape[-1] <= self.dim:
            raise ValueError(
                f"g must have shape (B, n) with offset + n at most {self.dim}, got {tuple(g.shape)} at {offset}"
            )
        self._check("g", g)
        parts = [self._kind.project(x, at, backend) for x, at in aligned(g, offset, self._kind.align)]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    def running(self) -> "RunningProjection":
        """Return an empty sum of projections of parts, for gradients that are never whole in memory."""
        return RunningProjection(self)

    def adjoint(
        self, y: Tensor, *, offset: int = 0, size: int | None = None, backend: Backend | None = None
    ) -> Tensor:
        r"""Return `y P`, the transpose of `project` with the same scale, or a range of its coordinates.

        Args:
            y: (..., k), floating-point, any strides.
            offset: the first coordinate.
            size: how many; None for all from `offset` on.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            (..., size), float32 (float64 for float64).

        Raises:
            ValueError: if shapes or the range do not fit, or `y` requires grad.

        Scratch: the result; `sjlt`, `srht`, `two_sided` and `tensorsketch` take some tensors of 4 million elements.
        """
        size = self.dim - offset if size is None else size
        if y.dim() == 0 or y.shape[-1] != self.k:
            raise ValueError(f"y must have {self.k} as its last dimension, got shape {tuple(y.shape)}")
        if not 0 <= offset <= offset + size <= self.dim:
            raise ValueError(f"offset and size must lie within {self.dim}, got {offset} and {size}")
        self._check("y", y)
        flat = y.reshape(y.shape[:-1].numel(), self.k)
        before = offset % self._kind.align
        out = self._kind.adjoint(flat, size + before, offset - before, backend)
        return out[:, before:].reshape(*y.shape[:-1], size)

    @staticmethod
    def _check(name: str, x: Tensor) -> None:
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require grad, the projection has no backward: pass {name}.detach()"
            )

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Return left (k_o, p) and right (k_i, d) of `two_sided`, float32, for `per_sample.TwoSided`.

        Raises:
            ValueError: for another kind.
        """
        if not isinstance(self._kind, TwoSides):
            raise ValueError(f"kind must be 'two_sided' to have matrices, got {self.kind!r}")
        return self._kind.matrices

    def project_rows(
        self, g: Tensor, rows: Tensor, *, offset: int | None = None, backend: Backend | None = None
    ) -> Tensor:
        r"""Return the projections of matrices, flattened row by row, that are zero outside some rows.

        Args:
            g: those rows of each matrix, (B, n, d).
            rows: which they are, n different numbers, int64.
            offset: the coordinate at which the matrix begins, where it is a part of what is projected; None: it is
                all of it, and d divides `dim`.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            (B, k), what `project` gives for the whole matrices up to rounding, for `n d k` sign products each.

        Raises:
            ValueError: if `g`, `rows` or `offset` do not fit.

        Scratch: that of `project`; where d is no multiple of 128, also a copy of `g`, each row of which grows
        by at most 254 coordinates.
        """
        if g.dim() != 3 or g.shape[2] == 0 or (offset is None and self.dim % g.shape[2] != 0):
            raise ValueError(
                f"g must have shape (B, n, d) with d a divisor of {self.dim}, got {tuple(g.shape)}"
            )
        offset = 0 if offset is None else offset
        if not 0 <= offset <= self.dim:
            raise ValueError(f"offset must be between 0 and {self.dim}, got {offset}")
        self._check_index("rows", rows, (self.dim - offset) // g.shape[2])
        if len(rows) != g.shape[1]:
            raise ValueError(f"rows must have {g.shape[1]} elements, got {len(rows)}")
        values, counts = rows.unique(return_counts=True)
        if len(values) != len(rows):
            twice = int(values[counts > 1][0])
            first, second = (rows == twice).nonzero().flatten().tolist()[:2]
            raise ValueError(f"rows must be different numbers, got {twice} at {first} and at {second}")
        if self.kind != "rademacher":
            return self._rows_by_parts(g.detach(), rows, offset, backend)
        flat, blocks = _blocked(g.detach(), rows.long(), offset)
        return select("rademacher_project", backend, (flat,))(flat, self.k, self.seed, blocks)

    def _rows_by_parts(self, g: Tensor, rows: Tensor, offset: int, backend: Backend | None) -> Tensor:
        total = g.new_zeros(g.shape[0], self.k, dtype=torch.float64)
        for n, row in enumerate(rows.tolist()):
            total += self.project_part(g[:, n], offset + row * g.shape[2], backend=backend)
        return total.to(accumulation_dtype(g))

    @staticmethod
    def _check_index(name: str, index: Tensor, size: int) -> None:
        if index.dim() != 1 or index.is_floating_point():
            raise ValueError(f"{name} must be a vector of indices, got {index.dtype} {tuple(index.shape)}")
        least, most = (int(index.min()), int(index.max())) if index.numel() else (0, -1)
        if least < 0 or most >= size:
            raise ValueError(f"{name} must be in [0, {size}), got {least} to {most}")

    def signs(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return entries of `P` of kind `rademacher` before the scale, for checks: int8, +1 or -1.

        Args:
            rows: indices of outputs, (m,).
            cols: indices of coordinates, (n,).

        Returns:
            (m, n).

        Raises:
            ValueError: if either is no vector of indices within range, or the kind is another.
        """
        if self.kind != "rademacher":
            raise ValueError(f"kind must be 'rademacher' to have signs, got {self.kind!r}")
        for name, index, size in (("rows", rows, self.k), ("cols", cols, self.dim)):
            self._check_index(name, index, size)
        return reference.rademacher_signs(rows.long(), cols.long(), self.seed)


class RunningProjection:
    """The sum of the projections of a gradient's parts, in float64, as they come; made by `Projection.running`."""

    def __init__(self, projection: Projection) -> None:
        self.projection = projection
        self.coordinates = 0
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, g: Tensor, *, backend: Backend | None = None) -> None:
        """Take in the next coordinates, (B, n) or (n,) for a single gradient.

        Raises:
            ValueError: as `Projection.project_part`, or if the batch is not that of the parts before.
        """
        flat = g.unsqueeze(0) if g.dim() == 1 else g
        part = self.projection.project_part(flat, self.coordinates, backend=backend)
        if self._total is None:
            self._total = torch.zeros_like(part, dtype=torch.float64)
        if part.shape != self._total.shape:
            raise ValueError(f"g must have {len(self._total)} rows as the parts before, got {len(part)}")
        self._dtype = torch.promote_types(self._dtype, part.dtype)
        self._total += part
        self.coordinates += flat.shape[1]

    def result(self) -> Tensor:
        """Return the projections, (B, k), float32 (float64 if a part was).

        Raises:
            ValueError: if the parts do not make up a whole gradient yet.
        """
        if self._total is None or self.coordinates != self.projection.dim:
            raise ValueError(f"parts must make up {self.projection.dim} coordinates, got {self.coordinates}")
        return self._total.to(self._dtype)


def _blocked(g: Tensor, rows: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """Rows (B, n, d) of a matrix as whole blocks of coordinates, zero elsewhere, and the numbers of the blocks."""
    block, d = reference.SIGNS_A_CALL, g.shape[2]
    if d % block == 0 and offset % block == 0:
        per_row = torch.arange(d // block, device=g.device) + offset // block
        return g.flatten(1), (rows[:, None] * (d // block) + per_row).flatten()
    coordinates = (offset + rows[:, None] * d + torch.arange(d, device=g.device)).flatten()
    blocks, place = torch.unique(coordinates // block, return_inverse=True)
    flat = g.new_zeros(g.shape[0], len(blocks) * block)
    flat[:, place * block + coordinates % block] = g.flatten(1)
    return flat, blocks

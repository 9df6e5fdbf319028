r"""Random projections without a matrix: `y = g P^T / \sqrt k` with `P` made while it is used."""

from typing import Final, Literal

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, select
from unlearn_kernels._loader import have_C
from unlearn_kernels.reference import influence as reference
from unlearn_kernels.reference.dtypes import accumulation_dtype

Kind = Literal["rademacher"]
_MOST: Final = {"dim": 1 << 39, "k": 1 << 32, "seed": (1 << 63) - 1}


def _fake(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    return g.new_empty(g.shape[0], k, dtype=accumulation_dtype(g))


def _triton(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    from unlearn_kernels.triton_kernels import influence as kernels

    return kernels.rademacher_project(g, k, seed, blocks)


_ops.register_operator(
    "rademacher_project",
    "influence",
    "g P^T / sqrt(k), P = +-1",
    reference=reference.rademacher_project,
    fake=_fake,
    triton=_triton,
)


def _vmap(
    info: object, in_dims: tuple[int | None, ...], g: Tensor, k: int, seed: int, blocks: Tensor | None = None
) -> tuple[Tensor, int]:
    if in_dims[0] is None or (blocks is not None and in_dims[3] is not None):
        raise NotImplementedError("rademacher_project: only g can be batched by vmap")
    g = g.movedim(in_dims[0], 0)
    rows = torch.ops.unlearn_kernels.rademacher_project(g.flatten(0, 1), k, seed, blocks)
    return rows.unflatten(0, g.shape[:2]), 0


if have_C:
    torch.library.register_vmap("unlearn_kernels::rademacher_project", _vmap)


class Projection:
    r"""A random projection from `dim` coordinates to `k` that keeps inner products: `E[P^T P] = k I`.

    `P` is (k, dim) with independent signs from Philox4x32-10, keyed by `seed`: they depend on (seed, row,
    coordinate) alone, so they are the same on every device and backend, for every batch and thread count,
    and a projection to fewer outputs or from fewer coordinates uses a corner of the same matrix. No part of
    `P` is ever in memory, beyond the signs of a block.

    Args:
        dim: coordinates of a gradient, at most 2^39.
        k: coordinates of a projection, at most 2^32.
        kind: the distribution of `P`; `rademacher` is +1 or -1 with equal odds.
        seed: at least 0, less than 2^63.

    Raises:
        ValueError: if a number is out of range or `kind` is unknown.

    Sources: Johnson and Lindenstrauss 1984; Achlioptas 2003 for signs; its use on gradients: Park et al. 2023
    (TRAK, arXiv 2303.14186). `docs/influence.md` has the layout of `P`.
    """

    def __init__(self, dim: int, k: int, kind: Kind = "rademacher", seed: int = 0) -> None:
        for name, value, least in (("dim", dim, 1), ("k", k, 1), ("seed", seed, 0)):
            if not least <= value <= _MOST[name]:
                raise ValueError(f"{name} must be between {least} and {_MOST[name]}, got {value}")
        if kind != "rademacher":
            raise ValueError(f"kind must be 'rademacher', got {kind!r}")
        self.dim, self.k, self.kind, self.seed = dim, k, kind, seed

    def __repr__(self) -> str:
        return f"Projection(dim={self.dim}, k={self.k}, kind={self.kind!r}, seed={self.seed})"

    def __call__(self, g: Tensor) -> Tensor:
        """Do the same as `project(g)`."""
        return self.project(g)

    def project(self, g: Tensor, *, backend: Backend | None = None) -> Tensor:
        r"""Return `g P^T / \sqrt k`.

        Args:
            g: gradients, (..., dim), float32, float64, bfloat16 or float16, any strides.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            (..., k), float32 (float64 for float64). On the CPU the bits of a row are the same whatever rows
            are beside it and at every thread count, and for all but float64 on every instruction set.

        Raises:
            ValueError: if the last dimension of `g` is not `dim`, it is no floating-point tensor, or it
                requires grad: there is no backward.

        Scratch on the CPU: at most 0.5 MB a thread, whatever dim, k and the batch. Sums are kept in float for
        2048 coordinates at a time and in double above that.
        """
        if g.dim() == 0 or g.shape[-1] != self.dim:
            raise ValueError(f"g must have {self.dim} as its last dimension, got shape {tuple(g.shape)}")
        if not g.is_floating_point():
            raise ValueError(f"g must be a floating-point tensor, got {g.dtype}")
        if g.requires_grad and torch.is_grad_enabled():
            raise ValueError("g must not require grad, the projection has no backward: pass g.detach()")
        flat = g if g.dim() == 2 else g.reshape(g.shape[:-1].numel(), self.dim)
        y = select("rademacher_project", backend, (flat,))(flat, self.k, self.seed)
        return y.reshape(*g.shape[:-1], self.k)

    def project_rows(self, g: Tensor, rows: Tensor, *, backend: Backend | None = None) -> Tensor:
        r"""Return the projections of matrices, flattened row by row, that are zero outside some rows.

        Args:
            g: those rows of each matrix, (B, n, d), where d divides `dim`.
            rows: which they are, n different numbers, int64.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            (B, k), what `project` gives for the whole matrices up to rounding, for `n d k` sign products each.

        Raises:
            ValueError: if `g` or `rows` do not fit.

        Scratch: that of `project`; where d is no multiple of 128, also a copy of `g`, each row of which grows
        by at most 254 coordinates.
        """
        if g.dim() != 3 or g.shape[2] == 0 or self.dim % g.shape[2] != 0:
            raise ValueError(
                f"g must have shape (B, n, d) with d a divisor of {self.dim}, got {tuple(g.shape)}"
            )
        self._check_index("rows", rows, self.dim // g.shape[2])
        if len(rows) != g.shape[1]:
            raise ValueError(f"rows must have {g.shape[1]} elements, got {len(rows)}")
        flat, blocks = _blocked(g.detach(), rows.long())
        return select("rademacher_project", backend, (flat,))(flat, self.k, self.seed, blocks)

    @staticmethod
    def _check_index(name: str, index: Tensor, size: int) -> None:
        if index.dim() != 1 or index.is_floating_point():
            raise ValueError(f"{name} must be a vector of indices, got {index.dtype} {tuple(index.shape)}")
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"{name} must be in [0, {size})")

    def signs(self, rows: Tensor, cols: Tensor) -> Tensor:
        """Return entries of `P` before the scale, for checks: int8, +1 or -1.

        Args:
            rows: indices of outputs, (m,).
            cols: indices of coordinates, (n,).

        Returns:
            (m, n).

        Raises:
            ValueError: if either is no vector of indices within range.
        """
        for name, index, size in (("rows", rows, self.k), ("cols", cols, self.dim)):
            self._check_index(name, index, size)
        return reference.rademacher_signs(rows.long(), cols.long(), self.seed)


def _blocked(g: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (B, n, d) of a matrix as whole blocks of coordinates, zero elsewhere, and the numbers of the blocks."""
    block, d = reference.SIGNS_A_CALL, g.shape[2]
    if d % block == 0:
        per_row = torch.arange(d // block, device=g.device)
        return g.flatten(1), (rows[:, None] * (d // block) + per_row).flatten()
    coordinates = (rows[:, None] * d + torch.arange(d, device=g.device)).flatten()
    blocks, place = torch.unique(coordinates // block, return_inverse=True)
    flat = g.new_zeros(g.shape[0], len(blocks) * block)
    flat[:, place * block + coordinates % block] = g.flatten(1)
    return flat, blocks

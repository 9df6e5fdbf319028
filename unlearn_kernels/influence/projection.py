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


def _fake(g: Tensor, k: int, seed: int) -> Tensor:
    return g.new_empty(g.shape[0], k, dtype=accumulation_dtype(g))


def _triton(g: Tensor, k: int, seed: int) -> Tensor:
    from unlearn_kernels.triton_kernels import influence as kernels

    return kernels.rademacher_project(g, k, seed)


_ops.register_operator(
    "rademacher_project",
    "influence",
    "g P^T / sqrt(k), P = +-1",
    reference=reference.rademacher_project,
    fake=_fake,
    triton=_triton,
)


def _vmap(info: object, in_dims: tuple[int, None, None], g: Tensor, k: int, seed: int) -> tuple[Tensor, int]:
    g = g.movedim(in_dims[0], 0)
    return torch.ops.unlearn_kernels.rademacher_project(g.flatten(0, 1), k, seed).unflatten(0, g.shape[:2]), 0


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
            if index.dim() != 1 or index.is_floating_point():
                got = f"{index.dtype} {tuple(index.shape)}"
                raise ValueError(f"{name} must be a vector of indices, got {got}")
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(f"{name} must be in [0, {size})")
        return reference.rademacher_signs(rows.long(), cols.long(), self.seed)

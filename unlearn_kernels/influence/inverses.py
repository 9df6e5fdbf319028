r"""Inverse curvatures of flattened parameters, for `influence_update_`."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unlearn_kernels.influence._residuals import norms, relative
from unlearn_kernels.influence.datainf import check_damping
from unlearn_kernels.influence.ekfac import EKFAC
from unlearn_kernels.influence.woodbury import Woodbury


class Inverse(Protocol):
    """Products with an inverse curvature of the flattened parameters: (1, D) to the solution and its residual."""

    def __call__(self, v: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return x (1, D) and its residual (1,)."""
        ...


def _checked(v: Tensor, size: int) -> Tensor:
    if v.dim() != 2 or v.shape[1] != size:
        raise ValueError(f"v must be (Q, {size}), got {tuple(v.shape)}")
    return v


def newton(hessian: Tensor) -> Inverse:
    """Return exact products with the inverse of a positive definite matrix (D, D), by Cholesky in float64.

    Raises:
        ValueError: if it is no such matrix.
    """
    if hessian.dim() != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must be a square matrix, got {tuple(hessian.shape)}")
    wide = hessian.detach().double()
    factor, info = torch.linalg.cholesky_ex(wide)
    if int(info) != 0:
        raise ValueError(f"hessian must be positive definite, pivot {int(info) - 1} is not")

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        right = _checked(v, len(wide)).double()
        x = torch.cholesky_solve(right.T, factor).T
        return x, relative(x @ wide - right, right)

    return solve


def fisher(rows: Tensor, damping: float) -> Inverse:
    """Return products with the inverse of the damped empirical Fisher matrix of gradients (n, D), by `Woodbury`."""
    factored = Woodbury(rows, damping)

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        solution = factored.solve(v.double())
        return solution.x, solution.residual

    return solve


def diagonal(squares: Tensor, damping: float) -> Inverse:
    """Return products with the inverse of `diag(squares) + damping`, squares (D,): a diagonal Fisher matrix.

    Raises:
        ValueError: if an entry and the damping do not add up to something positive.
    """
    if squares.dim() != 1:
        raise ValueError(f"squares must be (D,), got {tuple(squares.shape)}")
    entries = squares.detach().double() + damping
    bad = (~(entries > 0)).nonzero().flatten()
    if len(bad):
        at = int(bad[0])
        raise ValueError(
            f"squares and damping must add up to positive numbers, got {float(entries[at])} at {at}"
        )

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        right = _checked(v, len(entries)).double()
        x = right / entries
        return x, relative(x * entries - right, right)

    return solve


def datainf_inverse(rows: Sequence[Tensor], damping: Tensor) -> Inverse:
    r"""Return DataInf's products: `\frac 1 n \sum_i (g_i g_i^T + \lambda_l I)^{-1} v` layer by layer.

    The residual is that of the system it stands for, `(\frac 1 n \sum_i g_i g_i^T + \lambda_l I) x = v`: how good the
    approximation is, not how well it was computed.

    Args:
        rows: each layer's gradients, (n, d_l), in the order of the flattened parameters.
        damping: (L,), positive; 0 for a layer whose gradients are all zero, which does not move.

    Raises:
        ValueError: if shapes do not fit, there is no row, or a damping is none.
    """
    if not rows or damping.shape != (len(rows),) or any(g.dim() != 2 or len(g) != len(rows[0]) for g in rows):
        raise ValueError(
            f"rows must be matrices (n, d) and damping ({len(rows)},), got {tuple(damping.shape)}"
        )
    if len(rows[0]) == 0:
        raise ValueError(f"rows must not be empty, got {tuple(rows[0].shape)}")
    sizes = [g.shape[1] for g in rows]
    squares = [norms(g).square() for g in rows]
    check_damping(damping, torch.stack(squares))

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        right = _checked(v, sum(sizes)).double()
        solved, left = [], []
        for g, square, part, lam in zip(rows, squares, right.split(sizes, 1), damping.double(), strict=True):
            wide = g.double()
            weights = (part @ wide.T) / (lam + square) / len(wide)
            x = (part - weights @ wide) / lam if lam > 0 else torch.zeros_like(part)
            solved.append(x)
            left.append((x @ wide.T) @ wide / len(wide) + lam * x - part)
        return torch.cat(solved, 1), relative(torch.cat(left, 1), right)

    return solve


def ekfac_inverse(layers: Sequence[EKFAC], *, damping: float | None = None) -> Inverse:
    """Return products with fitted `EKFAC` layers, whose parameters follow one another as `Module.parameters` has them.

    Args:
        layers: `EKFAC` after `add_lambda`, one a linear layer: p d numbers of its weight (p, d), then, where it was
            fitted with the bias, p of that.
        damping: as of `EKFAC.solve`.

    Raises:
        ValueError: if there is no layer or one is not fitted.
    """
    if not layers:
        raise ValueError("layers must not be empty")
    sizes = [layer.lambda_.numel() for layer in layers]

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        xs, left = [], []
        for layer, part in zip(layers, _checked(v, sum(sizes)).split(sizes, 1), strict=True):
            x, residual = layer.solve(_matrices(part, layer), damping=damping)
            size = norms(part)
            xs.append(_flat(x, layer.bias))
            left.append(residual * torch.where(size > 0, size, 1.0))
        return torch.cat(xs, 1), relative(torch.stack(left, 1), v)

    return solve


def _matrices(v: Tensor, layer: EKFAC) -> Tensor:
    """Weights and then biases (Q, p d + p) as matrices (Q, p, d + 1) that end in the bias."""
    outputs, inputs = layer.lambda_.shape
    if not layer.bias:
        return v.unflatten(1, (outputs, inputs))
    weight, bias = v.split([outputs * (inputs - 1), outputs], 1)
    return torch.cat([weight.unflatten(1, (outputs, inputs - 1)), bias[:, :, None]], 2)


def _flat(x: Tensor, bias: bool) -> Tensor:
    return torch.cat([x[:, :, :-1].flatten(1), x[:, :, -1]], 1) if bias else x.flatten(1)

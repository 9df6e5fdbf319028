r"""From a forget gradient to the step that unlearns it: `\theta \leftarrow \theta + \alpha H^{-1} v`."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from unlearn_kernels.influence.ekfac import EKFAC
from unlearn_kernels.influence.woodbury import Woodbury


class Update(NamedTuple):
    """The step before its scale, in the shapes of the parameters, and `|H delta - v| / |v|`."""

    delta: list[Tensor]
    residual: float


class Inverse(Protocol):
    """Products with an inverse curvature of the flattened parameters: (1, D) to the solution and its residual."""

    def __call__(self, v: Tensor, /) -> tuple[Tensor, Tensor]:
        """Return x (1, D) and its residual (1,)."""
        ...


def forget_gradient(forget: Tensor, retain: Tensor) -> Tensor:
    r"""Return `v = n_f / (n_f + n_r) (\bar g_f - \bar g_r)` of IU, from rows of gradients (n_f, D) and (n_r, D).

    Raises:
        ValueError: if either is empty or widths differ.

    Source: Izzo et al. 2021; Jia et al. 2023 (arXiv 2304.04934).
    """
    if (
        forget.dim() != 2
        or retain.dim() != 2
        or forget.shape[1] != retain.shape[1]
        or not len(forget) * len(retain)
    ):
        raise ValueError(
            f"forget and retain must be (n, D) with n > 0, got {tuple(forget.shape)} and {tuple(retain.shape)}"
        )
    share = len(forget) / (len(forget) + len(retain))
    return share * (forget.mean(0, dtype=torch.float64) - retain.mean(0, dtype=torch.float64)).to(
        forget.dtype
    )


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
        x = torch.cholesky_solve(v.double().T, factor).T
        return x, _relative(x @ wide, v)

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
    entries = squares.detach().double() + damping
    if not bool((entries > 0).all()):
        raise ValueError("squares and damping must add up to positive numbers")

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        x = v.double() / entries
        return x, _relative(x * entries, v)

    return solve


def datainf_inverse(rows: Sequence[Tensor], damping: Tensor) -> Inverse:
    r"""Return DataInf's products: `\frac 1 n \sum_i (g_i g_i^T + \lambda_l I)^{-1} v` layer by layer.

    The residual is that of the system it stands for, `(\frac 1 n \sum_i g_i g_i^T + \lambda_l I) x = v`: how good the
    approximation is, not how well it was computed.

    Args:
        rows: each layer's gradients, (n, d_l), in the order of the flattened parameters.
        damping: (L,), positive.

    Raises:
        ValueError: if shapes do not fit.
    """
    if not rows or damping.shape != (len(rows),) or any(g.dim() != 2 or len(g) != len(rows[0]) for g in rows):
        raise ValueError(
            f"rows must be matrices (n, d) and damping ({len(rows)},), got {tuple(damping.shape)}"
        )
    sizes = [g.shape[1] for g in rows]

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        solved, applied = [], []
        for g, part, lam in zip(rows, v.double().split(sizes, 1), damping.double(), strict=True):
            wide = g.double()
            weights = (part @ wide.T) / (lam + wide.square().sum(1)) / len(wide)
            solved.append((part - weights @ wide) / lam)
            applied.append((solved[-1] @ wide.T) @ wide / len(wide) + lam * solved[-1])
        return torch.cat(solved, 1), _relative(torch.cat(applied, 1), v)

    return solve


def ekfac_inverse(layers: Sequence[EKFAC], *, damping: float | None = None) -> Inverse:
    """Return products with fitted `EKFAC` layers, whose weights (p, d) follow one another in the flattened parameters.

    Args:
        layers: `EKFAC` after `add_lambda`, one a weight (with the bias as its last column where it was fitted so).
        damping: as of `EKFAC.solve`.

    Raises:
        ValueError: if one is not fitted.
    """
    if not layers:
        raise ValueError("layers must not be empty")
    shapes = [layer.lambda_.shape for layer in layers]

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        xs, squares = [], torch.zeros(len(v), dtype=torch.float64, device=v.device)
        for layer, shape, part in zip(layers, shapes, v.split([s.numel() for s in shapes], 1), strict=True):
            x, residual = layer.solve(part.unflatten(1, shape), damping=damping)
            xs.append(x.flatten(1))
            squares += (residual * torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)) ** 2
        return torch.cat(xs, 1), squares.sqrt() / torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)

    return solve


def _relative(applied: Tensor, v: Tensor) -> Tensor:
    wide = v.double()
    norm = wide.norm(dim=1)
    left = (applied.double() - wide).norm(dim=1)
    return torch.where(norm > 0, left / norm, left)


@torch.no_grad()
def influence_update_(
    parameters: Sequence[Tensor],
    v: Tensor,
    inverse: Inverse | Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Update:
    r"""Add `\alpha H^{-1} v` to parameters in place: the unlearning step of influence.

    With `v = \sum_{i \in S} \nabla \ell_i(\theta)` and `H` the Hessian of the loss over what remains, `\alpha = 1` is
    the Newton step of certified removal; with IU's `v` (`forget_gradient`) and a Fisher matrix it is IU.

    Args:
        parameters: the tensors that are moved, any shapes and floating-point dtypes.
        v: the right-hand side, (D,), the parameters flattened one after another.
        inverse: `newton`, `fisher`, `diagonal`, `datainf_inverse`, `ekfac_inverse`, or a function of (1, D) that gives
            the solution and its residual (`lambda v: cg(hvp, v)[:2]`).
        scale: `\alpha`.
        mask: (D,) of 0 and 1 or bool: coordinates that may move (SalUn); it masks the step, not `v`.

    Returns:
        The step before `scale`, masked, and the residual `|H \delta - v| / |v|` of the step without its mask.

    Raises:
        ValueError: if sizes do not fit, or the step is not finite: nothing is changed then.

    Warns:
        RuntimeWarning: if `v` is zero: the step is nothing. One baseline has this bug, by taking the forget set's
            gradient for the retain set's.

    Sources: Koh and Liang 2017; Guo et al. 2020 (arXiv 1911.03030); Jia et al. 2023; Fan et al. 2024 (SalUn).
    """
    size = sum(p.numel() for p in parameters)
    for name, x in (("v", v), ("mask", mask)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(x.shape)}")
    if not bool(v.any()):
        warnings.warn("influence_update_: v is zero, nothing will move", RuntimeWarning, stacklevel=2)
    solution = inverse(v.detach()[None])
    step, residual = solution[0][0], float(solution[1][0])
    if step.shape != (size,):
        raise ValueError(f"inverse must return (1, {size}), got {tuple(solution[0].shape)}")
    if not bool(step.isfinite().all()):
        raise ValueError("inverse must return finite numbers")
    step = step if mask is None else step * mask
    parts = step.split([p.numel() for p in parameters])
    delta = [part.view(p.shape) for part, p in zip(parts, parameters, strict=True)]
    for p, part in zip(parameters, delta, strict=True):
        p.copy_(p.double() + scale * part.double().to(p.device))
    return Update(delta, residual)

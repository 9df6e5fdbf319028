"""Gramians that rules must take: of conflicting, dependent, zero and badly scaled gradients."""

import torch
from torch import Tensor

from unlearn_kernels.testing import randn


def jacobian(sets: int, columns: int = 12, *, seed: int = 0) -> Tensor:
    """Rows that conflict with the first one."""
    J = randn(sets, columns, dtype=torch.float64, seed=seed)
    J[1:] -= 0.4 * J[:1]
    return J


def dependent(sets: int, *, seed: int = 0) -> Tensor:
    """A Jacobian whose last row is the sum of the others; the only one is repeated."""
    J = jacobian(sets, seed=seed)
    J[-1] = J[:-1].sum(0) if sets > 2 else -0.5 * J[0]
    return J


def awkward(sets: int) -> dict[str, Tensor]:
    """Jacobians at the edges."""
    J = jacobian(sets)
    with_zero = J.clone()
    with_zero[-1] = 0
    scales = 10.0 ** torch.linspace(-3, 3, sets, dtype=torch.float64)
    return {
        "dependent": dependent(sets),
        "equal": J[:1].expand(sets, -1),
        "one is zero": with_zero,
        "all are zero": torch.zeros_like(J),
        "lengths from 1e-3 to 1e3": J * scales[:, None],
        "opposite": torch.stack([J[0] * (-1.0) ** k for k in range(sets)]),
        "orthogonal": torch.eye(sets, 12, dtype=torch.float64),
    }

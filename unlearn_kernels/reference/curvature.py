"""Products of curvature in plain formulas."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype

_AT_ONCE: Final = 1 << 22  # elements in float64


def squared_gradients(a: Tensor, g: Tensor) -> Tensor:
    """Return `sum_n (sum_t g_nt a_nt^T)^2` elementwise, (p, d), a sample at a time."""
    dtype = accumulation_dtype(a, g)
    out = a.new_zeros(g.shape[2], a.shape[2], dtype=dtype)
    for a_n, g_n in zip(a.to(dtype), g.to(dtype), strict=True):
        out += (g_n.T @ a_n) ** 2
    return out


def squared_rows(x: Tensor) -> Tensor:
    """Return `sum_b x_b^2` elementwise, (d,)."""
    dtype = accumulation_dtype(x)
    out = x.new_zeros(x.shape[1], dtype=dtype)
    for row in x:
        out += row.to(dtype) ** 2
    return out


def covariance(x: Tensor) -> Tensor:
    """Return `x^T x`."""
    wide = x.to(accumulation_dtype(x))
    return wide.T @ wide


def datainf_scores(rows: list[Tensor], queries: list[Tensor], norms: Tensor, damping: Tensor) -> Tensor:
    """Return the sum over layers of `(V G^T - C G G^T / n) / damping`, (Q, n) float64.

    `C = V G^T / (damping + norms)`, norms (L, n) the squared norms of the rows, damping (L,). Near-parallel rows leave
    `damping / norms` of the first term: all of it is in float64.
    """
    total = norms.new_zeros(queries[0].shape[0], rows[0].shape[0], dtype=torch.float64)
    for g, v, norm, lam in zip(rows, queries, norms.double(), damping.double(), strict=True):
        products, correction = torch.zeros_like(total), torch.zeros_like(total)
        for part, of_v in _columns(g, v):
            products.addmm_(of_v, part.T)
        weights = products / (lam + norm) / max(len(g), 1)
        for part, _ in _columns(g, v):
            correction.addmm_(weights @ part, part.T)
        total += (products - correction) / lam
    return total


def _columns(g: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both in float64, some columns at a time."""
    columns = max(256, _AT_ONCE // max(len(g) + len(v), 1))
    for part, of_v in zip(g.split(columns, 1), v.split(columns, 1), strict=True):
        yield part.double(), of_v.double()


def cholesky_update(factor: Tensor, x: Tensor, downdate: bool) -> tuple[Tensor, Tensor]:
    """Return the upper triangular `R` with `R^T R = factor^T factor + x^T x`, or minus, and how many pivots it has.

    Fewer than all: the result is not positive definite and `R` means nothing.
    """
    matrix = factor.double().T @ factor.double() + (-1 if downdate else 1) * (x.double().T @ x.double())
    updated, info = torch.linalg.cholesky_ex(matrix, upper=True)
    pivots = torch.where(info > 0, info - 1, torch.full_like(info, len(factor)))
    return updated, pivots.to(torch.int64)

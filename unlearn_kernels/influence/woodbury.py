r"""Products with `(\lambda I + G^T G / n)^{-1}`, G the rows of a store, also when some are removed."""

from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, Impl, Operator, select
from unlearn_kernels.influence._residuals import relative
from unlearn_kernels.reference import curvature

_COLUMNS: Final = 1 << 16  # that are in float64 at once
_UPDATE: Final = Operator(
    "cholesky_update",
    "influence",
    "R^T R = U^T U +- x^T x",
    {
        "cpp": Impl("cpp", _ops.raw("cholesky_update"), ("cpu",), reason_unavailable=_ops.no_extension),
        "reference": Impl("reference", curvature.cholesky_update, ("cpu",)),
    },
)


class Solution(NamedTuple):
    """Solutions (Q, D), and the norm of what is left of each right-hand side, relative to its own, (Q,) float64."""

    x: Tensor
    residual: Tensor


class Woodbury:
    r"""A factorisation of `H = n \lambda I + \sum_i g_i g_i^T` of which rows can be taken away.

    `F = H / n` is the damped empirical Fisher matrix. It is the n x n Gram matrix that is factored, by Cholesky, in
    float64: `H^{-1} v = (v - G^T (n \lambda I + G G^T)^{-1} G v) / (n \lambda)`.

    Args:
        rows: `G`, (n, D), floating-point; it is kept, not copied.
        damping: `\lambda`, positive.

    Raises:
        ValueError: if `rows` is no such matrix, has no row or is not finite, or `damping` is not positive or too small
            for a factor in float64.

    Scratch: two n x n matrices in float64, and `rows` in float64 by 65,536 columns. `n^2 D + n^3 / 3` multiply-adds.
    Products are torch's: nothing here is above a BLAS's reach but the deletion.

    Sources: Woodbury 1950; Singh and Alistarh 2020 (WoodFisher, arXiv 2004.14340). The recursion of the same name in
    the unlearning baseline IU is a correction along the first gradient alone.
    """

    def __init__(self, rows: Tensor, damping: float) -> None:
        if rows.dim() != 2 or not rows.is_floating_point() or len(rows) == 0:
            raise ValueError(
                f"rows must be (n, D) with n > 0, floating-point, got {rows.dtype} {tuple(rows.shape)}"
            )
        if not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}")
        self._rows, self.damping = rows.detach(), float(damping)
        self.kept = torch.arange(len(rows), device=rows.device)
        self.total = len(rows) * self.damping
        gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for part in self._parts():
            gram.addmm_(part, part.T)
        gram.diagonal().add_(self.total)
        self._factor, info = torch.linalg.cholesky_ex(gram, upper=True)
        if int(info) != 0 or not bool(self._factor.isfinite().all()):
            raise ValueError(
                f"rows must be finite and damping large enough to factor their products, got damping {damping} "
                f"and a diagonal from {float(gram.diagonal().min())} to {float(gram.diagonal().max())}"
            )

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def rows(self) -> Tensor:
        """The rows that are left."""
        return self._rows if len(self.kept) == len(self._rows) else self._rows[self.kept]

    def _parts(self) -> Iterator[Tensor]:
        """The rows that are left in float64, some columns at a time."""
        for part in self._rows.split(_COLUMNS, 1):
            yield (part if len(self.kept) == len(part) else part[self.kept]).double()

    def _products(self, v: Tensor) -> Tensor:
        """`G v^T`, (n, Q) float64."""
        out = torch.zeros(len(self), len(v), dtype=torch.float64, device=v.device)
        for part, of_v in zip(self._parts(), v.split(_COLUMNS, 1), strict=True):
            out.addmm_(part, of_v.double().T)
        return out

    def _combined(self, c: Tensor) -> Tensor:
        """`c^T G`, (Q, D) float64."""
        return torch.cat([c.T @ part for part in self._parts()], dim=1)

    def solve(self, v: Tensor) -> Solution:
        r"""Return `F^{-1} v` with `F = \lambda I + G^T G / n`, n the number of rows at the beginning.

        After `remove` the sum goes on without the removed rows while `n` stays: what a model trained on the rest with
        the same total weight decay has.

        Args:
            v: right-hand sides, (Q, D) or (D,).

        Returns:
            `x` in the shape and accumulation type of `v` (float64 for float64, else float32), and the residuals
            `|F x - v| / |v|` of the returned x.

        Raises:
            ValueError: if `v` is not as wide as the rows.
        """
        flat = v.unsqueeze(0) if v.dim() == 1 else v
        if flat.dim() != 2 or flat.shape[1] != self._rows.shape[1]:
            raise ValueError(f"v must have {self._rows.shape[1]} columns, got shape {tuple(v.shape)}")
        n = self.total / self.damping
        wide = flat.detach().double() * n
        x = self._once(wide)
        x += self._once(wide - self._applied(x))
        out = x.to(torch.float64 if v.dtype == torch.float64 else torch.float32)
        residual = relative(self._applied(out.double()) - wide, wide)
        return Solution(out[0], residual[0]) if v.dim() == 1 else Solution(out, residual)

    def _once(self, v: Tensor) -> Tensor:
        c = torch.cholesky_solve(self._products(v), self._factor, upper=True)
        return (v - self._combined(c)) / self.total

    def _applied(self, x: Tensor) -> Tensor:
        """`H x`."""
        return self.total * x + self._combined(self._products(x))

    def remove(self, index: Tensor | list[int], *, backend: Backend | None = None) -> None:
        r"""Take rows away: the factor of `H - \sum_{i \in index} g_i g_i^T` from the one at hand.

        Deleting a row and column of the Gram matrix leaves a positive update of the factor's trailing block, so no
        accuracy is lost, however near to dependent the rows are. `O(n^2)` a row; nothing of D is read.

        Args:
            index: which rows, by their number at the beginning, integers; not one that is gone.
            backend: as of `cholesky_update`.

        Raises:
            ValueError: if an index is no integer, out of range, given twice or gone.
            BackendError: if `backend` cannot run.
        """
        given = torch.as_tensor(index, device=self.kept.device).flatten()
        if len(given) and (given.dtype == torch.bool or given.is_floating_point() or given.is_complex()):
            raise ValueError(f"index must be integers, got {given.dtype}")
        gone = given.long()
        values, counts = gone.unique(return_counts=True)
        bad = values[(counts > 1) | torch.isin(values, self.kept, invert=True)]
        if len(bad):
            raise ValueError(
                f"index must name different rows that are left, got {int(bad[0])}, "
                f"first of {len(bad)} that are gone or given twice"
            )
        at = torch.searchsorted(self.kept, gone)
        factor = self._factor
        for position in at.sort(descending=True).values.tolist():
            factor = _without(factor, position, backend)
        self._factor = factor
        keep = torch.ones(len(self.kept), dtype=torch.bool, device=self.kept.device)
        keep[at] = False
        self.kept = self.kept[keep]


def _without(factor: Tensor, at: int, backend: Backend | None) -> Tensor:
    """The factor of a matrix of which a row and column are deleted."""
    tail, row = factor[at + 1 :, at + 1 :], factor[at, at + 1 :]
    keep = torch.cat([torch.arange(at), torch.arange(at + 1, len(factor))]).to(factor.device)
    left = factor[keep][:, keep]
    if len(row):
        left[at:, at:] = cholesky_update(tail, row.unsqueeze(0), backend=backend)
    return left


def woodbury_solve(rows: Tensor, v: Tensor, damping: float) -> Solution:
    r"""Return `(\lambda I + G^T G / n)^{-1} v` for one right-hand side or several, with residuals.

    Args:
        rows: `G`, (n, D).
        v: (Q, D) or (D,).
        damping: `\lambda`.

    Returns:
        What `Woodbury(rows, damping).solve(v)` does.

    Raises:
        ValueError: as `Woodbury` and its `solve`.
    """
    return Woodbury(rows, damping).solve(v)


def cholesky_update(
    factor: Tensor, x: Tensor, *, downdate: bool = False, backend: Backend | None = None
) -> Tensor:
    r"""Return the upper triangular `R` with `R^T R = U^T U + x^T x`, or minus, for `m n^2` multiply-adds.

    Args:
        factor: `U`, upper triangular, (n, n).
        x: the rows that are added or, with `downdate`, taken off, (m, n).
        downdate: takes them off, by hyperbolic rotations.
        backend: see `unlearn_kernels.use_backend`; `reference` factors the sum anew.

    Returns:
        (n, n) float64, on the device of `factor`; the work is done on the CPU.

    Raises:
        ValueError: if shapes do not fit, or what is left is not positive definite.
        BackendError: if `backend` cannot run.

    Source: Golub and Van Loan, Matrix Computations, 4th ed., section 6.5.
    """
    if factor.dim() != 2 or x.dim() != 2 or not factor.shape[0] == factor.shape[1] == x.shape[1]:
        raise ValueError(
            f"factor and x must be (n, n) and (m, n), got {tuple(factor.shape)} and {tuple(x.shape)}"
        )
    on_cpu = tuple(t.detach().double().cpu().contiguous() for t in (factor, x))
    updated, pivots = select(_UPDATE, backend, on_cpu)(*on_cpu, downdate)
    if pivots < len(factor):
        raise ValueError(f"factor must stay positive definite without x, pivot {pivots} is not positive")
    return updated.triu_().to(factor.device)

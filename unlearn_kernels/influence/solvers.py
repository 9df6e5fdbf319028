"""Iterative products with an inverse: many right-hand sides at once, each with its residual."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_kernels.influence._residuals import norms, relative
from unlearn_kernels.influence.woodbury import Solution

Product = Callable[[Tensor], Tensor]


class Iterated(NamedTuple):
    """Solutions (Q, D), residuals relative to the right-hand sides (Q,) float64, and iterations each took (Q,)."""

    x: Tensor
    residual: Tensor
    iterations: Tensor


def _right_hand_sides(v: Tensor, damping: float) -> Tensor:
    if v.dim() != 2 or not v.is_floating_point():
        raise ValueError(f"v must be (Q, D) and floating-point, got {v.dtype} {tuple(v.shape)}")
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}")
    return v.detach()


def _product(hvp: Product, x: Tensor) -> Tensor:
    product = hvp(x)
    if product.shape != x.shape:
        raise ValueError(f"hvp must return {tuple(x.shape)} for that shape, got {tuple(product.shape)}")
    return product


def cg(hvp: Product, v: Tensor, *, damping: float = 0.0, tol: float = 1e-6, max_iter: int = 100) -> Iterated:
    r"""Solve `(H + \lambda I) x = v` by conjugate gradients, Q right-hand sides side by side.

    Every side has steps of its own and stands still once its residual is below `tol`; a call of `hvp` serves those that
    are left. Directions of zero or negative curvature end a side where it is.

    Args:
        hvp: (q, D) to (q, D): the products with H of as many vectors, a positive semi-definite matrix.
        v: right-hand sides, (Q, D).
        damping: `\lambda`.
        tol: the residual relative to `v`'s norm at which a side stops.
        max_iter: products at most, but for the last one.

    Returns:
        Solutions, true residuals `|(H + \lambda) x - v| / |v|` (one more product), and iterations.

    Raises:
        ValueError: if `v` or `damping` is none, or `hvp` returns another shape.

    Scratch: four times `v`.

    Source: Hestenes and Stiefel 1952; Martens 2010 for its use on Hessians.
    """
    v = _right_hand_sides(v, damping)
    x, r = torch.zeros_like(v), v.clone()
    p, rr = r.clone(), norms(r).square()
    goal = tol**2 * rr
    iterations = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    active = (rr > goal).nonzero().flatten()
    for _ in range(max_iter):
        if len(active) == 0:
            break
        direction = p[active]
        product = _product(hvp, direction) + damping * direction
        curvature = (direction.double() * product.double()).sum(1)
        bends = curvature > 0
        active, direction, product, curvature = (t[bends] for t in (active, direction, product, curvature))
        if len(active) == 0:
            break
        alpha = (rr[active] / curvature).to(v.dtype)[:, None]
        x[active] += alpha * direction
        r[active] -= alpha * product
        iterations[active] += 1
        before, rr[active] = rr[active], norms(r[active]).square()
        p[active] = r[active] + (rr[active] / before).to(v.dtype)[:, None] * direction
        active = active[rr[active] > goal[active]]
    return Iterated(x, relative(_product(hvp, x) + damping * x - v, v), iterations)


def lissa(
    hvp: Product,
    v: Tensor,
    *,
    damping: float = 0.0,
    scale: float,
    tol: float = 1e-6,
    max_iter: int = 5000,
) -> Iterated:
    r"""Solve `(H + \lambda I) x = v` by `y \leftarrow v + y - (H + \lambda I) y / s`, `x = y / s`.

    It converges where `s` is above half of the largest eigenvalue of `H + \lambda I`; what is not finite or grows past
    the right-hand side tenfold raises. Damping is divided by `s` like `H`, which not every implementation does.

    Args:
        hvp: as of `cg`; it may be that of a random batch, then `tol` is of that batch's residual.
        v: right-hand sides, (Q, D).
        damping: `\lambda`.
        scale: `s`.
        tol: the residual at which a side stops.
        max_iter: products at most, but for the last one.

    Returns:
        Solutions, residuals by one more product, and iterations.

    Raises:
        ValueError: if `v`, `damping` or `scale` is none, or `hvp` returns another shape.
        ArithmeticError: if it diverges: `scale` is too small.

    Scratch: twice `v`.

    Source: Agarwal, Bullins and Hazan 2017 (arXiv 1602.03943); Koh and Liang 2017.
    """
    v = _right_hand_sides(v, damping)
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    y = v.clone()
    goal = tol * norms(v)
    iterations = torch.zeros(len(v), dtype=torch.int64, device=v.device)
    active = torch.arange(len(v), device=v.device)
    for _ in range(max_iter):
        current = y[active]
        step = v[active] - (_product(hvp, current) + damping * current) / scale
        size = norms(step)
        if not bool((size <= 10 * norms(v[active])).all()):
            raise ArithmeticError(
                f"lissa diverges at scale {scale}: it must be above half the largest eigenvalue"
            )
        y[active] = current + step
        iterations[active] += 1
        active = active[size > goal[active]]
        if len(active) == 0:
            break
    x = y / scale
    return Iterated(x, relative(_product(hvp, x) + damping * x - v, v), iterations)


class Eigenpairs(NamedTuple):
    """Eigenvalues (k,), largest magnitude first, vectors (k, D), and residuals `|H u - theta u|` (k,) float64."""

    values: Tensor
    vectors: Tensor
    residual: Tensor

    def solve(self, v: Tensor, *, damping: float = 0.0) -> Solution:
        r"""Return the projection of v on the eigenvectors divided by `\theta + \lambda`.

        Args:
            v: (Q, D).
            damping: `\lambda`.

        Returns:
            `x` (Q, D) in the vectors' dtype, and bounds of the residuals `|(H + \lambda) x - v| / |v|`, (Q,) float64,
            that need no product: what of v the vectors do not span, and what the pairs' own residuals make of x.

        Raises:
            ValueError: if `v` is not as wide as the vectors, or an eigenvalue and the damping cancel.
        """
        if v.dim() != 2 or v.shape[1] != self.vectors.shape[1]:
            raise ValueError(f"v must be (Q, {self.vectors.shape[1]}), got {tuple(v.shape)}")
        values = self.values + damping
        if bool((values == 0).any()):
            raise ValueError(f"damping must not cancel an eigenvalue, got {damping}")
        parts = v.to(self.vectors.dtype) @ self.vectors.T
        weights = parts / values.to(parts.dtype)
        left = norms(parts @ self.vectors - v) + weights.abs().double() @ self.residual
        scale = norms(v)
        return Solution(weights @ self.vectors, torch.where(scale > 0, left / scale, left))


def arnoldi(hvp: Product, start: Tensor, *, steps: int, top: int) -> Eigenpairs:
    r"""Find eigenpairs of a symmetric H of largest magnitude from a Krylov space.

    Twice orthogonalised in the type of `start`; the projected matrix is symmetrised and its eigenvectors taken in
    float64.

    Args:
        hvp: (1, D) to (1, D).
        start: the first vector, (D,), not zero.
        steps: products; fewer if the space is exhausted.
        top: how many pairs, at most `steps`.

    Returns:
        At most `top` pairs, each with its residual (one product each).

    Raises:
        ValueError: if `start` is zero or no vector, `top` is not in 1 ... steps, or `hvp` returns another shape.

    Scratch: `steps + top` vectors.

    Source: Schioppa et al. 2022 (arXiv 2112.03052).
    """
    if start.dim() != 1 or not bool(start.norm() > 0):
        raise ValueError(f"start must be a vector other than 0, got shape {tuple(start.shape)}")
    if not 1 <= top <= steps:
        raise ValueError(f"top must be between 1 and {steps} steps, got {top}")
    basis, images = _krylov(hvp, start.detach(), steps)
    projected = basis.double() @ images.double().T
    values, vectors = torch.linalg.eigh((projected + projected.T) / 2)
    order = values.abs().argsort(descending=True)[:top]
    ritz = torch.nn.functional.normalize(vectors.T[order].to(basis.dtype) @ basis, dim=1)
    applied = torch.cat([_product(hvp, u[None]) for u in ritz])
    return Eigenpairs(values[order], ritz, norms(applied - values[order, None].to(ritz.dtype) * ritz))


def _krylov(hvp: Product, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the space of H^j start, and the images of its vectors."""
    basis, images = [start / start.norm()], []
    for _ in range(steps):
        images.append(_product(hvp, basis[-1][None])[0])
        u, known = images[-1], torch.stack(basis)
        size = u.norm()
        for _ in range(2):
            u = u - known.T @ (known @ u)
        if len(images) == steps or not bool(u.norm() > 16 * torch.finfo(u.dtype).eps * size):
            break
        basis.append(u / u.norm())
    return torch.stack(basis), torch.stack(images)

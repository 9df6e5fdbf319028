r"""EK-FAC: the Fisher matrix of a linear layer, diagonal in the basis of its Kronecker factors' eigenvectors."""

import math
from typing import Final, Literal, get_args

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend, select
from unlearn_kernels._loader import have_C
from unlearn_kernels.influence import _curvature_ops  # noqa: F401  registers the operators
from unlearn_kernels.influence._residuals import relative
from unlearn_kernels.influence._scan import products
from unlearn_kernels.influence.woodbury import Solution
from unlearn_kernels.reference.dtypes import accumulation_dtype

Route = Literal["factors", "gradients"]
_ROUTES: Final = get_args(Route)


def covariance(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    r"""Return `\sum_t x_t x_t^T` over all leading dimensions, for half the multiply-adds of a product.

    Args:
        x: (..., d), float32, float64, bfloat16 or float16, any strides.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (d, d), float32 (float64 for float64), symmetric bit for bit.

    Raises:
        ValueError: if `x` is no floating-point tensor with a dimension.

    Scratch: 0.5 MB a thread.
    """
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be (..., d) and floating-point, got {x.dtype} {tuple(x.shape)}")
    flat = x.detach().reshape(-1, x.shape[-1])
    return select("covariance", backend, (flat,))(flat)


def squared_rows(x: Tensor, *, backend: Backend | None = None) -> Tensor:
    r"""Return `\sum_b x_b^2` elementwise: the diagonal of the empirical Fisher matrix of gradients (B, D), times B.

    Args:
        x: (B, D), float32, float64, bfloat16 or float16, any strides.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (D,), float32 (float64 for float64). Squares of single samples, not of their mean.

    Raises:
        ValueError: if `x` is no floating-point matrix.

    Scratch: 16 KB a thread.
    """
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (B, D) and floating-point, got {x.dtype} {tuple(x.shape)}")
    flat = x.detach()
    return select("squared_rows", backend, (flat,))(flat)


def squared_gradients(A: Tensor, G: Tensor, *, bias: bool = False, backend: Backend | None = None) -> Tensor:
    r"""Return `\sum_n (\sum_t g_{nt} a_{nt}^T)^2` elementwise, with no per-sample gradient in memory.

    Args:
        A: layer inputs, (B, ..., d), float32, float64, bfloat16 or float16, any strides.
        G: gradients at the layer's outputs, (B, ..., p), with the leading dimensions of `A`.
        bias: appends an input of 1: the bias's in the last column.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (p, d), or (p, d + 1) with the bias, float32 (float64 for float64).

    Raises:
        ValueError: if shapes or dtypes do not fit.

    Scratch: 0.8 MB a thread, and a copy of `A` for the bias.
    """
    a, g = _folded(A, G, bias)
    return select("squared_gradients", backend, (a, g))(a, g)


def _folded(A: Tensor, G: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    if A.dim() < 2 or A.shape[:-1] != G.shape[:-1]:
        raise ValueError(
            f"A and G must agree in all dimensions but the last, got {tuple(A.shape)} and {tuple(G.shape)}"
        )
    if not (A.is_floating_point() and G.is_floating_point()):
        raise ValueError(f"A and G must be floating-point, got {A.dtype} and {G.dtype}")
    if A.dtype != G.dtype and torch.float64 in (A.dtype, G.dtype):
        raise ValueError(f"A and G must both be float64 or neither, got {A.dtype} and {G.dtype}")
    tokens = A.shape[1:-1].numel()
    a, g = (x.detach().reshape(x.shape[0], tokens, x.shape[-1]) for x in (A, G))
    return (torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2) if bias else a), g


def rotated_squares(
    A: Tensor,
    G: Tensor,
    basis: tuple[Tensor, Tensor],
    *,
    bias: bool = False,
    route: Route | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Return `\sum_n (Q_G^T \nabla_n Q_A)^2` elementwise, what a batch adds to EK-FAC's `\Lambda`.

    Args:
        A: layer inputs, (B, ..., d).
        G: gradients at the layer's outputs, (B, ..., p).
        basis: `Q_G` (p, p) and `Q_A` (d, d), with the bias (d + 1, d + 1).
        bias: appends an input of 1.
        route: as of `EKFAC.add_lambda`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (p, d), or (p, d + 1) with the bias, float32 (float64 for float64).

    Raises:
        ValueError: if shapes or dtypes do not fit, or the route is unknown.
    """
    if route is not None and route not in _ROUTES:
        raise ValueError(f"route must be None or one of {', '.join(_ROUTES)}, got {route!r}")
    a, g = _folded(A, G, bias)
    left, right = (x.to(accumulation_dtype(a, g)) for x in basis)
    if left.shape != (g.shape[2],) * 2 or right.shape != (a.shape[2],) * 2:
        raise ValueError(
            f"basis must be ({g.shape[2]}, {g.shape[2]}) and ({a.shape[2]}, {a.shape[2]}), "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    chosen = route or EKFAC.route(a.shape[1], a.shape[2], g.shape[2])
    if chosen == "factors":
        squared = select("squared_gradients", backend, (a, g))
        return squared(_rotated(a.to(right.dtype), right, backend), _rotated(g.to(left.dtype), left, backend))
    new = torch.zeros(g.shape[2], a.shape[2], dtype=left.dtype, device=a.device)
    for a_n, g_n in zip(a, g, strict=True):
        rotated_n = left.T @ (g_n.to(left.dtype).T @ a_n.to(left.dtype)) @ right
        new.addcmul_(rotated_n, rotated_n)
    return new


def _rotated(x: Tensor, basis: Tensor, backend: Backend | None) -> Tensor:
    """(B, T, d) times (d, d)."""
    if x.device.type != "cpu" or not have_C:
        return x @ basis
    return products(x.flatten(0, 1), basis.T, backend).unflatten(0, x.shape[:2])


class EKFAC:
    r"""The Fisher matrix of one linear layer as `(Q_G \otimes Q_A) \Lambda (Q_G \otimes Q_A)^T`.

    `add_covariance` for every batch, `fit_basis`, `add_lambda` for every batch, then `solve`.
    Both sums are divided by the number of samples, as Kronfluence does with one loss a sample.

    Args:
        bias: appends an input of 1 to every token.

    Attributes:
        basis: eigenvectors of `\sum_t g_t g_t^T`, (p, p), and of `\sum_t a_t a_t^T`, (d, d), as columns.
        samples: those that `lambda_` is a sum over.

    Sources: George et al. 2018 (arXiv 1806.03884); Grosse et al. 2023 (arXiv 2308.03296).
    """

    def __init__(self, *, bias: bool = False) -> None:
        self.bias, self.samples = bias, 0
        self.basis: tuple[Tensor, Tensor] | None = None
        self._factors: tuple[Tensor, Tensor] | None = None
        self._lambda: Tensor | None = None

    def add_covariance(self, A: Tensor, G: Tensor, *, backend: Backend | None = None) -> None:
        """Take in a batch: inputs (B, ..., d), gradients at the outputs (B, ..., p).

        Raises:
            ValueError: if shapes do not fit.
        """
        a, g = _folded(A, G, self.bias)
        new = covariance(g, backend=backend), covariance(a, backend=backend)
        old = self._factors
        self._factors = new if old is None else (old[0] + new[0], old[1] + new[1])

    def fit_basis(self) -> None:
        """Find the eigenvectors, by LAPACK in float64.

        Raises:
            ValueError: if there is no covariance yet, or one is not finite.
        """
        if self._factors is None:
            raise ValueError("add_covariance must come before fit_basis")
        for name, factor in zip(("G", "A"), self._factors, strict=True):
            if not bool(factor.isfinite().all()):
                raise ValueError(f"covariances must be finite, that of {name} is not")
        g, a = (torch.linalg.eigh(x.double()).eigenvectors.to(x.dtype) for x in self._factors)
        self.basis, self._lambda, self.samples = (g, a), None, 0

    @staticmethod
    def route(tokens: int, inputs: int, outputs: int) -> Route:
        """Which is cheaper: to rotate the factors of a gradient, or the gradient made of them."""
        gain = inputs * outputs * (inputs + outputs)
        return "factors" if tokens * (inputs**2 + outputs**2) <= gain else "gradients"

    def add_lambda(
        self, A: Tensor, G: Tensor, *, route: Route | None = None, backend: Backend | None = None
    ) -> None:
        r"""Add a batch to `\Lambda = \sum_n (Q_G^T \nabla_n Q_A)^2`.

        Args:
            A: (B, ..., d).
            G: (B, ..., p).
            route: `factors` rotates `A` and `G` and squares tiles of their product; `gradients` rotates one sample's
                gradient at a time; None takes the cheaper. Neither holds B x p x d.
            backend: see `unlearn_kernels.use_backend`.

        Raises:
            ValueError: if shapes do not fit, the route is unknown, or there is no basis yet.
        """
        if self.basis is None:
            raise ValueError("fit_basis must come before add_lambda")
        new = rotated_squares(A, G, self.basis, bias=self.bias, route=route, backend=backend)
        self._lambda = new if self._lambda is None else self._lambda + new
        self.samples += len(A)

    @property
    def lambda_(self) -> Tensor:
        r"""`\Lambda` averaged over samples, (p, d) or (p, d + 1) with the bias.

        Raises:
            ValueError: if `add_lambda` was given no sample yet.
        """
        if self._lambda is None or self.samples == 0:
            raise ValueError("add_lambda must come before lambda_ and solve")
        return self._lambda / self.samples

    def rotate(self, v: Tensor) -> Tensor:
        """Return gradients (..., p, d) in the basis: where queries may stay while factors are rotated to them.

        Raises:
            ValueError: if there is no basis yet.
        """
        if self.basis is None:
            raise ValueError("fit_basis must come before rotate")
        left, right = (x.to(v.dtype) for x in self.basis)
        return left.T @ v @ right

    def solve(self, v: Tensor, *, damping: float | None = None) -> Solution:
        r"""Return `Q_G ((Q_G^T V Q_A) / (\Lambda + \lambda)) Q_A^T` for each matrix.

        Args:
            v: (Q, p, d), with a column more for the bias.
            damping: `\lambda`; None: a tenth of the mean of `\Lambda`, and `x` is 0 where all of that is.

        Returns:
            `x` in the shape and accumulation type of `v` (float64 for float64, else float32), and the residuals of the
            system solved, (Q,).

        Raises:
            ValueError: if `v` has another shape, `lambda_` is not finite, or the damping is not positive.
        """
        lam = self.lambda_
        if v.dim() != 3 or v.shape[1:] != lam.shape:
            raise ValueError(f"v must be (Q, {lam.shape[0]}, {lam.shape[1]}), got {tuple(v.shape)}")
        mean = float(lam.mean(dtype=torch.float64))
        if not math.isfinite(mean):
            raise ValueError(f"lambda_ must be finite, got a mean of {mean}")
        if damping is not None and not damping > 0:
            raise ValueError(f"damping must be positive, got {damping}")
        wide = v.to(accumulation_dtype(v))
        if damping is None and mean == 0:
            return Solution(torch.zeros_like(wide), relative(wide, wide))
        return self._solve(wide, lam.to(wide.dtype) + (0.1 * mean if damping is None else damping))

    def _solve(self, v: Tensor, damped: Tensor) -> Solution:
        assert self.basis is not None
        left, right = (x.to(v.dtype) for x in self.basis)
        x = left @ (self.rotate(v) / damped) @ right.T
        return Solution(x, relative(left @ (self.rotate(x) * damped) @ right.T - v, v))

"""Rules that look for a point of the gradients' convex hull."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unlearn_kernels.surgery.rules.rule import Rule, at_least, inverse, trace_scaled
from unlearn_kernels.surgery.rules.supports import min_linear_plus_norm, min_norm


@dataclass(eq=False)
class MGDA(Rule):
    r"""The shortest vector of the gradients' convex hull: a descent direction for all, or zero.

    .. math:: w = \arg\min_{w \ge 0, \, \sum w = 1} w^\top G w

    Solved exactly for K up to 10, with no wait on CUDA, and by quadprog on the host beyond. With `iterations` it is
    the published Frank-Wolfe method instead, begun at `1 / K`, for any K: a fixed number of steps, no wait either.

    Args:
        iterations: steps of Frank-Wolfe; None for the exact solution. The common number is 100.
        epsilon: a step of Frank-Wolfe shorter than this is the last.

    Raises:
        ValueError: if `iterations` is less than 1 or `epsilon` negative.

    Source: Désidéri 2012; Sener and Koltun 2018 (arXiv 1810.04650), algorithm 2.
    """

    name: ClassVar[str] = "mgda"
    iterations: int | None = None
    epsilon: float = 1e-3

    def __post_init__(self) -> None:
        if self.iterations is not None:
            at_least("iterations", self.iterations, 1)
        at_least("epsilon", self.epsilon, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """The weights on the simplex."""
        return min_norm(gramian) if self.iterations is None else self._frank_wolfe(gramian)

    def _frank_wolfe(self, gramian: Tensor) -> Tensor:
        assert self.iterations is not None
        w = torch.full_like(gramian[..., 0], 1 / gramian.shape[-1])
        going = torch.ones_like(w[..., :1], dtype=torch.bool)
        for _ in range(self.iterations):
            products = (gramian @ w[..., None])[..., 0]
            t = products.argmin(-1, keepdim=True)
            a, b = products.gather(-1, t), (w * products).sum(-1, keepdim=True)
            c = gramian.diagonal(dim1=-2, dim2=-1).gather(-1, t)
            inner = (b - a) / (b + c - 2 * a)
            gamma = torch.where(c <= a, 1.0, torch.where(b <= a, 0.0, inner))
            vertex = torch.zeros_like(w).scatter(-1, t, 1.0)
            w = torch.where(going, torch.lerp(w, vertex, gamma), w)
            going = going & (gamma >= self.epsilon)
        return w


@dataclass(eq=False)
class CAGrad(Rule):
    r"""Near the mean gradient, the direction in which the worst-off objective gains most.

    .. math:: w = \frac{1}{K} + \frac{\sqrt\phi}{\|g_v\|} v, \qquad
        v = \arg\min_{v \ge 0, \, \sum v = 1} \frac{1}{K} v^\top G 1 + \sqrt{\phi \, v^\top G v}, \qquad
        \phi = c^2 \|\bar g\|^2

    0 where `|g_v|` is below `norm_eps` of the gradients' Frobenius norm: a Pareto-stationary point. Solved exactly
    for K up to 10, with no wait on CUDA, and by quadprog on the host beyond.

    Args:
        c: radius of the ball around the mean, in parts of its norm; 0 is the mean. The paper has 0.2 to 0.8.
        norm_eps: see above.

    Raises:
        ValueError: if an argument is negative.

    Source: Liu et al. 2021 (arXiv 2110.14048), algorithm 1.
    """

    name: ClassVar[str] = "cagrad"
    c: float = 0.4
    norm_eps: float = 1e-4

    def __post_init__(self) -> None:
        at_least("c", self.c, 0)
        at_least("norm_eps", self.norm_eps, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """`1 / K + sqrt(phi) / |g_v| v`."""
        G, K = trace_scaled(gramian), gramian.shape[-1]
        to_mean = G.mean(-1)
        radius = self.c * to_mean.mean(-1).clamp(min=0).sqrt()
        v = min_linear_plus_norm(G, to_mean, radius)
        norm = (v * (G @ v[..., None])[..., 0]).sum(-1).clamp(min=0).sqrt()
        factor = (radius * inverse(norm))[..., None]
        return torch.where((norm >= self.norm_eps)[..., None], 1 / K + factor * v, 0.0)

"""Rules in which the gradients bargain: Nash's solution."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unlearn_kernels.surgery.rules.rule import Rule, at_least, cosines, diagonal, inverse

# Keeps the solution finite where gradients are opposite and none exists.
_RIDGE = 1e-9
_STEPS = 60


def _bargained(cosine_matrix: Tensor) -> Tensor:
    """`s > 0` with `C s = 1 / s`, (..., K): the least point of `s^T C s / 2 - sum_k log s_k`, by Newton's steps."""
    eye = torch.eye(cosine_matrix.shape[-1], dtype=cosine_matrix.dtype, device=cosine_matrix.device)
    C = cosine_matrix + _RIDGE * eye
    s = torch.ones_like(C[..., 0])
    for _ in range(_STEPS):
        slope = (C @ s[..., None])[..., 0] - 1 / s
        step = torch.linalg.solve_ex(C + torch.diag_embed(1 / s.square()), slope)[0]
        decrement = (slope * step).sum(-1, keepdim=True).clamp(min=0).sqrt()
        # The function is self-concordant: the damped step stays where s > 0.
        s = s - step * torch.where(decrement < 0.25, 1.0, 1 / (1 + decrement))
        # The best length along a direction is known: s^T C s = K.
        square = (s * (C @ s[..., None])[..., 0]).sum(-1, keepdim=True)
        s = s * (s.shape[-1] / square).sqrt()
        if s.is_cpu and bool((decrement < 1e-12).all()):
            break
    return s


@dataclass(eq=False)
class NashMTL(Rule):
    r"""Nash's bargaining solution among the tasks, clipped in norm. No wait on CUDA.

    .. math:: \frac{G}{\|G\|_F} \alpha = \frac{1}{\alpha}, \quad \alpha > 0, \qquad
        w = \alpha \min\Big(1, \frac{\text{max\_norm}}{\sqrt{\alpha^\top G \alpha}}\Big)

    The published code approaches it by a series of convex problems, begun at the last weights and left at a residual
    of 1e-3; here it is solved at every call, by Newton's method on `K` unknowns, to a residual of 1e-9. A zero gradient
    has weight 0. All weights are 0 where a positive combination vanishes to single precision (a Pareto-stationary
    point): there is no bargain, and a clipped combination would be rounding noise of length `max_norm`.

    Args:
        max_norm: bound of `|g|`; 0 for none.

    Raises:
        ValueError: if `max_norm` is negative.

    Source: Navon et al. 2022 (arXiv 2202.01017), algorithm 1; github.com/AvivNavon/nash-mtl.
    """

    name: ClassVar[str] = "nash_mtl"
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        at_least("max_norm", self.max_norm, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """`sqrt(|G|_F) D^-1/2 s`, clipped."""
        norms = diagonal(gramian).sqrt()
        # Zero gradients get a direction of their own, so that the others bargain without them.
        absent = torch.diag_embed((norms == 0).to(norms.dtype))
        C = cosines(gramian) + absent
        s = _bargained(C)
        # Without the ridge it would be K; where the ridge carries half of it, there is nothing else.
        stationary = 2 * (s * (C @ s[..., None])[..., 0]).sum(-1, keepdim=True) < s.shape[-1]
        s = torch.where(stationary, 0.0, s)
        alpha = s * inverse(norms) * torch.linalg.matrix_norm(gramian).sqrt()[..., None]
        if self.max_norm == 0:
            return alpha
        square = (alpha * (gramian @ alpha[..., None])[..., 0]).sum(-1, keepdim=True)
        norm = square.clamp(min=0).sqrt()
        return alpha * torch.where(norm > self.max_norm, self.max_norm * inverse(norm), 1.0)


@dataclass(eq=False)
class MUNBa(Rule):
    r"""Nash's bargaining solution of (forget, retain) in closed form. No wait on CUDA.

    .. math:: w_k = \frac{1}{\|g_k\| \sqrt{1 + \cos(f, r)}}

    the solution of `G w = 1 / w`. Where there is none (a gradient is zero, or they are opposite) the published code
    falls back to fixed weights.

    Args:
        forget: weight of `f` where bargaining fails; that of `r` is 1.

    Source: Wu and Harandi 2024 (arXiv 2411.15537); github.com/JingWu321/MUNBa.
    """

    name: ClassVar[str] = "munba"
    sets: ClassVar[int | None] = 2
    forget: float = 0.1

    def solve(self, gramian: Tensor) -> Tensor:
        """`1 / (|g_k| sqrt(1 + cos))`."""
        norms = diagonal(gramian).sqrt()
        shared = 1 + cosines(gramian)[..., 0, 1:]
        failed = (shared <= _RIDGE) | (norms == 0).any(-1, keepdim=True)
        fallback = torch.stack(
            [torch.full_like(norms[..., 0], self.forget), torch.ones_like(norms[..., 0])], -1
        )
        return torch.where(failed, fallback, inverse(norms * shared.clamp(min=_RIDGE).sqrt()))

"""Rules that balance the gradients' lengths or directions, in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from unlearn_kernels.surgery._lists import check_choice
from unlearn_kernels.surgery.rules.rule import Rule, at_least, cosines, diagonal, inverse, row, trace_scaled

# An entry of a Gramian is right to 1e-6 of |g_i| |g_j|: smaller eigenvalues of the cosines say nothing.
RANK_TOLERANCE = 1e-6


def _rank(gramian: Tensor, rtol: float) -> Tensor:
    """How many gradients are linearly independent, whatever their lengths, (...) int64."""
    values = torch.linalg.eigvalsh(cosines(gramian))
    return (values > rtol * values[..., -1:].clamp(min=0)).sum(-1)


def _largest(gramian: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (..., K) in ascending order, eigenvectors, and which of them the rank keeps."""
    values, vectors = torch.linalg.eigh(gramian)
    K = gramian.shape[-1]
    kept = torch.arange(K, device=gramian.device) >= K - rank[..., None]
    return values, vectors, kept & (values > 0)


def _apply(vectors: Tensor, factors: Tensor, x: Tensor) -> Tensor:
    """`V diag(factors) V^T x`."""
    return (vectors @ (factors[..., None] * (vectors.mT @ x[..., None])))[..., 0]


@dataclass(eq=False)
class NGDiff(Rule):
    r"""The difference of the normalised gradients of (forget, retain). No wait on CUDA.

    .. math:: g = r / \|r\| - f / \|f\|

    Here `f` is the gradient of the loss *to be raised*, as published; the other rules take the gradient of what is
    minimised. With `ascend=False` so does this one: `g = r / |r| + f / |f|`. A zero gradient has weight 0.

    Args:
        ascend: whether `f` is to be raised.

    Source: Bu et al. 2024 (arXiv 2410.22086).
    """

    name: ClassVar[str] = "ngdiff"
    sets: ClassVar[int | None] = 2
    ascend: bool = True

    def solve(self, gramian: Tensor) -> Tensor:
        """`(-1 / |f|, 1 / |r|)`."""
        f, r = inverse(diagonal(gramian).sqrt()).unbind(-1)
        return torch.stack([-f if self.ascend else f, r], -1)


@dataclass(eq=False)
class IMTLG(Rule):
    r"""The combination whose projections on all gradients have one length. A CUDA Gramian makes the host wait.

    .. math:: w = v / \textstyle\sum_k v_k, \qquad v = G^+ \sqrt{\operatorname{diag} G}

    0 where the sum of `v` vanishes. Linearly dependent gradients have the pseudo-inverse.

    Args:
        rtol: eigenvalues of the matrix of cosines below this part of the largest count as zero.

    Source: Liu et al. 2021, Towards Impartial Multi-task Learning; with the pseudo-inverse, Quinton and Rey 2024
    (arXiv 2406.16232).
    """

    name: ClassVar[str] = "imtl_g"
    waits: ClassVar[bool] = True
    rtol: float = RANK_TOLERANCE

    def __post_init__(self) -> None:
        at_least("rtol", self.rtol, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """`G^+ d / sum(G^+ d)`."""
        G, K = trace_scaled(gramian), gramian.shape[-1]
        norms, rank = diagonal(G).sqrt(), _rank(G, self.rtol)
        # In terms of unit vectors, so that a short gradient beside long ones keeps its digits.
        unit = torch.linalg.solve_ex(cosines(G), torch.ones_like(norms))[0] * inverse(norms)
        values, vectors, kept = _largest(G, rank)
        pseudo = _apply(vectors, torch.where(kept, inverse(values), 0.0), norms)
        v = torch.where(rank[..., None] == K, unit, pseudo)
        total = v.sum(-1, keepdim=True)
        return torch.where(total.abs() <= 1e-12 * v.abs().sum(-1, keepdim=True), 0.0, v / total)


@dataclass(eq=False)
class AlignedMTL(Rule):
    r"""The preferred sum after all principal directions were given one length. A CUDA Gramian makes the host wait.

    .. math:: w = \sqrt{s} \, V \Lambda^{-1/2} V^\top p, \qquad G = V \Lambda V^\top

    over the eigenvalues that are not zero; `s` is the smallest of them. Zero gradients have `w = p`.

    Args:
        preference: `p`, one number a set; None for `1 / K`.
        scale: which eigenvalue `s` is: `min`, `median`, or `rmse` for their mean.
        rtol: as IMTL-G's.

    Raises:
        ValueError: if `scale` is none of these.

    Source: Senushkin et al. 2023, Independent Component Alignment for Multi-Task Learning, algorithm 1.
    """

    name: ClassVar[str] = "aligned_mtl"
    waits: ClassVar[bool] = True
    preference: Sequence[float] | None = None
    scale: Literal["min", "median", "rmse"] = "min"
    rtol: float = RANK_TOLERANCE

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("min", "median", "rmse"))
        at_least("rtol", self.rtol, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """`sqrt(s) V L^-1/2 V^T p`."""
        G, K = trace_scaled(gramian), gramian.shape[-1]
        p = row(G, self.preference, 1 / K, "preference").expand(G.shape[:-1])
        rank = _rank(G, self.rtol)
        values, vectors, kept = _largest(G, rank)
        if self.scale == "rmse":
            s = torch.where(kept, values, 0.0).sum(-1) / rank
        else:
            place = K - rank + (0 if self.scale == "min" else (rank - 1) // 2)
            s = values.gather(-1, place.clamp(0, K - 1)[..., None])[..., 0]
        factors = torch.where(kept, (s[..., None] / values).sqrt(), 0.0)
        return torch.where(rank[..., None] == 0, p, _apply(vectors, factors, p))


@dataclass(eq=False)
class ConFIG(Rule):
    r"""The direction with preferred cosines to all gradients, as long as their sum's part along it.

    .. math:: u = U^+ p, \qquad g = \Big(\sum_k \langle g_k, u \rangle\Big) \frac{u}{\|u\|^2}

    with the unit vectors as rows of `U`. Published with a pseudo-inverse of that K x N matrix; here from the Gramian
    alone, since `U^+ = U^T (U U^T)^+` and `U U^T = D^{-1/2} G D^{-1/2}`, the matrix of cosines. Where `p` has no
    part in its range, as for opposite gradients, the weights are 0. A CUDA Gramian makes the host wait.

    Args:
        preference: `p`, one number a set; None for ones.
        rtol: as IMTL-G's.

    Source: Liu et al. 2024 (arXiv 2408.11104); github.com/tum-pbs/ConFIG.
    """

    name: ClassVar[str] = "config"
    waits: ClassVar[bool] = True
    preference: Sequence[float] | None = None
    rtol: float = RANK_TOLERANCE

    def __post_init__(self) -> None:
        at_least("rtol", self.rtol, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """`(U U^T)^+ p` in terms of the gradients, to length."""
        C, norms = cosines(gramian), diagonal(gramian).sqrt()
        p = row(C, self.preference, 1.0, "preference").expand(norms.shape)
        values, vectors, kept = _largest(C, _rank(gramian, self.rtol))
        y = _apply(vectors, torch.where(kept, inverse(values), 0.0), p)
        along = (C @ y[..., None])[..., 0]
        square = (y * along).sum(-1, keepdim=True)
        length = (norms * along).sum(-1, keepdim=True) * inverse(square)
        vanished = square <= 1e-16 * p.square().sum(-1, keepdim=True)
        return torch.where(vanished, 0.0, length * y * inverse(norms))

"""Rules that project to the dual cone of the gradients, where no objective is worked against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unlearn_kernels.surgery.rules.rule import Rule, at_least, row, trace_scaled
from unlearn_kernels.surgery.rules.supports import above


@dataclass(eq=False)
class _DualCone(Rule):
    preference: Sequence[float] | None = None
    reg_eps: float = 1e-4

    def __post_init__(self) -> None:
        at_least("reg_eps", self.reg_eps, 0)

    def _prepared(self, gramian: Tensor) -> tuple[Tensor, Tensor]:
        """The regularised Gramian, and the preference (..., K)."""
        K = gramian.shape[-1]
        p = row(gramian, self.preference, 1 / K, "preference").expand(gramian.shape[:-1])
        eye = torch.eye(K, dtype=gramian.dtype, device=gramian.device)
        return trace_scaled(gramian) + self.reg_eps * eye, p


@dataclass(eq=False)
class UPGrad(_DualCone):
    r"""Every gradient is projected to the dual cone of all; the preferred sum of the projections.

    .. math:: w = \sum_k \arg\min_{v \ge p_k e_k} v^\top \Big(\frac{G}{\operatorname{tr} G} + \epsilon I\Big) v

    Solved exactly for K up to 10, with no wait on CUDA, and by quadprog on the host beyond.

    Args:
        preference: `p`, one number a set; None for `1 / K`.
        reg_eps: `\epsilon`. The published code's 1e-4 makes the weights unique and the cone soft: a conflict of some
            1e-4 of the gradients' norms stays. 0 projects exactly.

    Raises:
        ValueError: if `reg_eps` is negative.

    Source: Quinton and Rey 2024 (arXiv 2406.16232).
    """

    name: ClassVar[str] = "upgrad"

    def solve(self, gramian: Tensor) -> Tensor:
        """The sum of K projections."""
        G, p = self._prepared(gramian)
        return above(G, torch.diag_embed(p)).sum(-2)


@dataclass(eq=False)
class DualProj(_DualCone):
    r"""The preferred sum of the gradients, projected to their dual cone: GEM's projection.

    .. math:: w = \arg\min_{v \ge p} v^\top \Big(\frac{G}{\operatorname{tr} G} + \epsilon I\Big) v

    Solved exactly for K up to 10, with no wait on CUDA, and by quadprog on the host beyond.

    Args:
        preference: as UPGrad's.
        reg_eps: as UPGrad's.

    Raises:
        ValueError: if `reg_eps` is negative.

    Source: Lopez-Paz and Ranzato 2017 (arXiv 1706.08840), equation 11; as an aggregator, Quinton and Rey 2024
    (arXiv 2406.16232).
    """

    name: ClassVar[str] = "dualproj"

    def solve(self, gramian: Tensor) -> Tensor:
        """One projection."""
        G, p = self._prepared(gramian)
        return above(G, p[..., None, :])[..., 0, :]

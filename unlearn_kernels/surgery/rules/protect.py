"""Rules of two gradients, (forget, retain), of which one is protected from the other."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from unlearn_kernels.surgery.rules.rule import Rule, at_least, diagonal, inverse


def _pair(forget: Tensor, retain: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(forget, retain), -1)


@dataclass(eq=False)
class AGEM(Rule):
    r"""The forget gradient without what works against the retain gradient. No wait on CUDA.

    .. math:: w = (1, -\min(0, \langle f, r \rangle) / \|r\|^2)

    What `project_conflict_` does in one call. A retain gradient of zero projects nothing.

    Source: A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420); PCGrad's one-sided form.
    """

    name: ClassVar[str] = "agem"
    sets: ClassVar[int | None] = 2
    one_sided: ClassVar[bool] = True

    def solve(self, gramian: Tensor) -> Tensor:
        """`(1, -min(0, <f, r>) / |r|^2)`."""
        dot, square = gramian[..., 0, 1], gramian[..., 1, 1]
        return _pair(torch.ones_like(dot), -dot.clamp(max=0) * inverse(square))

    def in_one_call(self) -> dict[str, Any]:
        """`agem`."""
        return {"rule": "agem"}


@dataclass(eq=False)
class GRU(Rule):
    r"""A-GEM against a moving average of retain gradients, with the projection limited. No wait on CUDA.

    .. math:: w = (1, -\|f\| \min(0, \max(\cos(f, r), -c)) / \|r\|)

    The moving average is kept by who calls (`GradientSurgery(ema=...)`): here `r` is what the Gramian was taken of.

    Args:
        cosine_clip: `c`; 1 or more is no limit, which is A-GEM's formula. The published option is 0.5: stronger
            conflicts are then removed in part only.

    Raises:
        ValueError: if `cosine_clip` is negative.

    Source: Gradient Rectified Unlearning, github.com/tmlr-group/GRU.
    """

    name: ClassVar[str] = "gru"
    sets: ClassVar[int | None] = 2
    one_sided: ClassVar[bool] = True
    cosine_clip: float = math.inf

    def __post_init__(self) -> None:
        at_least("cosine_clip", self.cosine_clip, 0)

    def solve(self, gramian: Tensor) -> Tensor:
        """`(1, -|f| / |r| min(0, max(cos, -c)))`."""
        norms = diagonal(gramian).sqrt()
        f, r = norms[..., 0], norms[..., 1]
        cosine = gramian[..., 0, 1] * inverse(f) * inverse(r)
        limited = cosine.clamp(min=-min(self.cosine_clip, 1.0), max=0)
        return _pair(torch.ones_like(f), -limited * f * inverse(r))

    def in_one_call(self) -> dict[str, Any]:
        """`gru`."""
        return {"rule": "gru", "cosine_clip": self.cosine_clip}


@dataclass(eq=False)
class BLUR(Rule):
    r"""One gradient as it is, and of the other what is orthogonal to it plus `\gamma` times it. No wait on CUDA.

    .. math::
        \text{lower: } g = r + (\gamma - \langle r, f \rangle / \|f\|^2) f \qquad
        \text{upper: } g = f + (\gamma - \langle r, f \rangle / \|r\|^2) r

    There is no test of a sign. With `lower`, forgetting comes first: along `f` the step is `\gamma f` whatever `r`
    says. Where the gradient that is divided by is zero, the other is left alone.

    Args:
        gamma: `\gamma`.
        lower: which. The published code runs `lower` with 1.0 whatever its caller asks for.

    Source: BLUR, arXiv 2506.08164; github.com/OptimAI-Lab/BLURLLMUnlearning.
    """

    name: ClassVar[str] = "blur"
    sets: ClassVar[int | None] = 2
    gamma: float = 1.0
    lower: bool = True

    def solve(self, gramian: Tensor) -> Tensor:
        """1 for the gradient that stays, `gamma - <r, f> / |x|^2` for the other one, `x`."""
        k = 0 if self.lower else 1
        square = gramian[..., k, k]
        moved = torch.where(square == 0, 0.0, self.gamma - gramian[..., 0, 1] * inverse(square))
        whole = torch.ones_like(moved)
        return _pair(moved, whole) if k == 0 else _pair(whole, moved)

    def in_one_call(self) -> dict[str, Any]:
        """`blur`."""
        return {"rule": "blur", "gamma": self.gamma, "lower": self.lower}

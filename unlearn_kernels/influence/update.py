r"""From a forget gradient to the step that unlearns it: `\theta \leftarrow \theta + \alpha H^{-1} v`."""

import math
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_kernels.influence.inverses import Inverse
from unlearn_kernels.reference.dtypes import accumulation_dtype


class Update(NamedTuple):
    """The step before its scale, in the shapes of the parameters, and `|H delta - v| / |v|`."""

    delta: list[Tensor]
    residual: float


def forget_gradient(forget: Tensor, retain: Tensor) -> Tensor:
    r"""Return `v = n_f / (n_f + n_r) (\bar g_f - \bar g_r)` of IU, from rows of gradients (n_f, D) and (n_r, D).

    It is float32 (float64 if either is): a difference of halves need not fit in theirs.

    Raises:
        ValueError: if either is empty or widths differ.

    Source: Izzo et al. 2021; Jia et al. 2023 (arXiv 2304.04934).
    """
    if (
        forget.dim() != 2
        or retain.dim() != 2
        or forget.shape[1] != retain.shape[1]
        or not len(forget) * len(retain)
    ):
        raise ValueError(
            f"forget and retain must be (n, D) with n > 0, got {tuple(forget.shape)} and {tuple(retain.shape)}"
        )
    share = len(forget) / (len(forget) + len(retain))
    difference = forget.mean(0, dtype=torch.float64) - retain.mean(0, dtype=torch.float64)
    return (share * difference).to(accumulation_dtype(forget, retain))


@torch.no_grad()
def influence_update_(
    parameters: Iterable[Tensor],
    v: Tensor,
    inverse: Inverse | Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> Update:
    r"""Add `\alpha H^{-1} v` to parameters in place: the unlearning step of influence.

    With `v = \sum_{i \in S} \nabla \ell_i(\theta)` and `H` the Hessian of the loss over what remains, `\alpha = 1` is
    the Newton step of certified removal; with IU's `v` (`forget_gradient`) and a Fisher matrix it is IU.

    Args:
        parameters: the tensors that are moved, any shapes and floating-point dtypes.
        v: the right-hand side, (D,), the parameters flattened one after another.
        inverse: `newton`, `fisher`, `diagonal`, `datainf_inverse`, `ekfac_inverse`, or a function of (1, D) that gives
            the solution and its residual (`lambda v: cg(hvp, v)[:2]`).
        scale: `\alpha`.
        mask: (D,), bool or numbers that are 0 or 1: coordinates that may move (SalUn); it masks the step, not `v`.

    Returns:
        The step before `scale`, masked, and the residual `|H \delta - v| / |v|` of the step without its mask.

    Raises:
        ValueError: if sizes or dtypes do not fit, or a parameter would not be finite in its dtype: nothing is changed
            then.

    Scratch: the step, and the new parameters in their dtypes.

    Warns:
        RuntimeWarning: if `v` is zero: the step is nothing. One baseline has this bug, by taking the forget set's
            gradient for the retain set's.

    Sources: Koh and Liang 2017; Guo et al. 2020 (arXiv 1911.03030); Jia et al. 2023; Fan et al. 2024 (SalUn).
    """
    moved = list(parameters)
    _check(moved, v, mask, scale)
    if not bool(v.any()):
        warnings.warn("influence_update_: v is zero, nothing will move", RuntimeWarning, stacklevel=2)
    solution = inverse(v.detach()[None])
    step, residual = solution[0][0], float(solution[1][0])
    if step.shape != v.shape:
        raise ValueError(f"inverse must return (1, {len(v)}), got {tuple(solution[0].shape)}")
    if not (bool(step.isfinite().all()) and math.isfinite(residual)):
        raise ValueError(f"inverse must return finite numbers, got a residual of {residual}")
    step = step if mask is None else step * mask
    parts = step.split([p.numel() for p in moved])
    delta = [part.view(p.shape) for part, p in zip(parts, moved, strict=True)]
    after = [
        (p.double() + scale * part.double().to(p.device)).to(p.dtype)
        for p, part in zip(moved, delta, strict=True)
    ]
    for number, new in enumerate(after):
        if not bool(new.isfinite().all()):
            raise ValueError(f"parameters must stay finite, number {number} does not in {new.dtype}")
    for p, new in zip(moved, after, strict=True):
        p.copy_(new)
    return Update(delta, residual)


def _check(parameters: list[Tensor], v: Tensor, mask: Tensor | None, scale: float) -> None:
    size = sum(p.numel() for p in parameters)
    for name, x in (("v", v), ("mask", mask)):
        if x is not None and x.shape != (size,):
            raise ValueError(f"{name} must have shape ({size},), got {tuple(x.shape)}")
    for number, p in enumerate(parameters):
        if not p.is_floating_point():
            raise ValueError(f"parameters must be floating-point, number {number} is {p.dtype}")
    if mask is not None and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"mask must be 0 or 1, got {mask[(mask != 0) & (mask != 1)][0].item()}")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")

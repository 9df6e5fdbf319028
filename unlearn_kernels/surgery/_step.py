"""What a step of several objectives found, and how its gradient is written."""

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_kernels._backends import Backend
from unlearn_kernels.surgery._lists import Scope
from unlearn_kernels.surgery._sharding import is_dtensor, local
from unlearn_kernels.surgery.combine import _combine
from unlearn_kernels.surgery.rules.rule import cosines, diagonal

Gradients: TypeAlias = list[Tensor | None]
By: TypeAlias = tuple[Scope, Sequence[int] | None]


class Step(NamedTuple):
    """What a step found and did: all on the device of the gradients, so that looking is what costs a wait.

    K objectives; for another scope than `global` there is a leading dimension of S segments; for `element` S is 0.

    Attributes:
        objectives: their names.
        gramian: (K, K) float64, the inner products before surgery, of unscaled gradients.
        weights: (K,) float64, how much of each gradient was taken. NaN where the Gramian is not finite.
        rates: for the scope `element`, (N,) float64: the share of elements of opposite signs, of each parameter with a
            gradient of the first objective.
    """

    objectives: tuple[str, ...]
    gramian: Tensor
    weights: Tensor
    rates: Tensor | None = None

    @property
    def norms(self) -> Tensor:
        """The gradients' norms before surgery, (K,)."""
        return diagonal(self.gramian).sqrt()

    @property
    def cosines(self) -> Tensor:
        """Between the gradients before surgery, (K, K); 0 where one is zero."""
        return cosines(self.gramian)

    @property
    def conflict_rate(self) -> Tensor:
        """For each pair of objectives the share of segments in which they conflict, (K, K)."""
        return (self.gramian < 0).double().reshape(-1, *self.gramian.shape[-2:]).mean(0)

    @property
    def norm(self) -> Tensor:
        """The norm of the combined gradient, (), from the Gramian."""
        return _square(self.weights, self.gramian).sqrt()

    @property
    def finite(self) -> Tensor:
        """Whether all gradients are, () bool."""
        found = self.gramian.isfinite().all()
        return found if self.rates is None else found & ~self.rates.isnan().any()


def _square(weights: Tensor, G: Tensor) -> Tensor:
    return (weights * (G @ weights[..., None])[..., 0]).sum().clamp(min=0)


def clipped(weights: Tensor, G: Tensor, max_norm: float | None) -> Tensor:
    """Weights with which the combined gradient is what `torch.nn.utils.clip_grad_norm_` would make of it."""
    if max_norm is None:
        return weights
    return weights * (max_norm / (_square(weights, G).sqrt() + 1e-6)).clamp(max=1)


def matched(gradients: Sequence[Tensor | None], likes: Sequence[Tensor]) -> list[Tensor]:
    """The parts that are here, with zeros, which take no memory, for gradients that are None."""
    return [_part(g, like) for g, like in zip(gradients, likes, strict=True)]


def _part(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is not None:
        return local(gradient)
    like = local(like)
    return like.new_zeros(()).expand_as(like)


def combined(
    held: Sequence[Gradients],
    keep: Sequence[int],
    places: Sequence[int],
    weights: Tensor,
    by: By,
    backend: Backend | None,
) -> Gradients:
    """The weighted sum, written over the first gradient that there is at a place.

    Args:
        held: K gradients.
        keep: those that must not be written over.
        places: the parameters that take part; others get None.
        weights: (K,), or (S, K) for a scope of S segments.
        by: the scope and the groups of `combine_`, for `places`.
        backend: of `combine_`.
    """
    targets = [_target(held, keep, i) for i in places]
    sets = [matched([gradients[i] for i in places], targets) for gradients in held]
    scope, groups = by
    _combine([local(x) for x in targets], sets, weights, scope, groups, backend)
    written: Gradients = [None] * len(held[0])
    for i, x in zip(places, targets, strict=True):
        written[i] = x
    return written


def _target(held: Sequence[Gradients], keep: Sequence[int], i: int) -> Tensor:
    free = (gradients[i] for k, gradients in enumerate(held) if k not in keep)
    kept = (torch.zeros_like(x) for k in keep if (x := held[k][i]) is not None)
    return next(x for x in chain(free, kept) if x is not None)


def listed(parameters: Any) -> tuple[list[nn.Parameter], list[int]]:
    """The trainable ones of a module's, of parameters or of parameter groups, and the number of each one's group.

    Raises:
        ValueError: if there is none.
    """
    given = list(parameters.parameters() if isinstance(parameters, nn.Module) else parameters)
    groups = [list(g["params"]) if isinstance(g, Mapping) else [g] for g in given]
    numbered = [(k, p) for k, group in enumerate(groups) for p in group if p.requires_grad]
    if not numbered:
        raise ValueError("parameters must hold at least one that requires a gradient, got none")
    # Parameters that come by themselves are of one group.
    many = any(isinstance(g, Mapping) for g in given)
    return [p for _, p in numbered], [k if many else 0 for k, _ in numbered]


def owned(gradient: Tensor | None) -> Tensor | None:
    """The gradient, out of a bucket that the next backward writes to (`gradient_as_bucket_view` of DDP)."""
    if gradient is None or is_dtensor(gradient):
        return gradient
    held = gradient.untyped_storage().nbytes()
    return gradient.clone() if held > gradient.numel() * gradient.element_size() else gradient


def step_if(optimizer: Optimizer, finite: Tensor) -> None:
    """A step that the optimizer's kernel leaves out where `finite` is false, with no word from the host."""
    told: Any = optimizer
    told.grad_scale, told.found_inf = None, (~finite).float()
    try:
        optimizer.step()
    finally:
        del told.grad_scale, told.found_inf

"""TorchJD on these kernels: `jac_to_grad` from the Gramian, over lists, with no concatenated Jacobian.

Call `jac_to_grad` here instead of TorchJD's, or `install()` it in `torchjd.autojac`. `as_rule` makes an aggregator
a rule of `unlearn_kernels.surgery`. What changes, besides speed and memory: Gramians and weights are float64
whatever the gradients' dtype, so that aggregators that fail on bfloat16 or on dependent gradients work; ConFIG needs
no pseudo-inverse of the whole Jacobian; a Gramian that is not finite gives NaN gradients and no exception.

Source: TorchJD, github.com/SimplexLab/TorchJD.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, ClassVar

import torch
import torchjd.autojac
from torch import Tensor
from torchjd import aggregation
from torchjd.aggregation import Aggregator, GramianWeightedAggregator

from unlearn_kernels import surgery
from unlearn_kernels._backends import FLOATS
from unlearn_kernels.surgery.rules import ConFIG, Rule

_theirs = torchjd.autojac.jac_to_grad

# Weightings that look at no more of the matrix than its height, dtype and device.
_BLIND = (aggregation.Constant, aggregation.Mean, aggregation.Random, aggregation.Sum)


class Weighted(Rule):
    """The weights of one of TorchJD's aggregators, from its own weighting. The host waits for a CUDA Gramian.

    Args:
        aggregator: one whose weights depend on the Gramian alone.

    Raises:
        ValueError: if it is another.
    """

    name: ClassVar[str] = "torchjd"
    waits: ClassVar[bool] = True

    def __init__(self, aggregator: Aggregator) -> None:
        self.aggregator = aggregator
        self.dtype = torch.float64
        if isinstance(aggregator, GramianWeightedAggregator):
            self._weigh: Callable[[Tensor], Tensor] = aggregator.gramian_weighting
        elif isinstance(aggregator, _BLIND):
            # Random draws in the matrix's dtype.
            self._weigh = lambda G: aggregator.weighting(G.new_empty(len(G), 0, dtype=self.dtype))
        elif isinstance(aggregator, aggregation.NashMTL):
            self._weigh = lambda G: aggregator.weighting(_square_root(G))
        else:
            raise ValueError(
                f"aggregator must have weights that depend on the Gramian alone, got {aggregator}"
            )

    def solve(self, gramian: Tensor) -> Tensor:
        """TorchJD's weights, one Gramian after the other."""
        K = gramian.shape[-1]
        rows = [self._weigh(G).double() for G in gramian.reshape(-1, K, K)]
        return torch.stack(rows).reshape(gramian.shape[:-1])

    def reset(self) -> None:
        """Resets the aggregator, where it has a state."""
        getattr(self.aggregator, "reset", lambda: None)()


def _square_root(gramian: Tensor) -> Tensor:
    """A matrix of K columns that has this Gramian."""
    values, vectors = torch.linalg.eigh(gramian)
    return vectors * values.clamp(min=0).sqrt()


def as_rule(aggregator: Aggregator) -> Rule:
    """A TorchJD aggregator as a rule for `surgery.weights` and `surgery.GradientSurgery`.

    Raises:
        ValueError: if its result is no weighted sum with weights from the Gramian: GradDrop, TrimmedMean, ExcessMTL
            and aggregators of other packages.
    """
    if isinstance(aggregator, aggregation.ConFIG):
        preference = aggregator.pref_vector
        return ConFIG(preference=None if preference is None else preference.tolist())
    return Weighted(aggregator)


def jac_to_grad(
    tensors: Iterable[Tensor],
    /,
    aggregator: Aggregator,
    *,
    retain_jac: bool = False,
    optimize_gramian_computation: bool = False,
) -> Tensor | None:
    """TorchJD's `jac_to_grad`: aggregates the `.jac` fields into the `.grad` fields.

    Two passes over the Jacobians, none of which is copied; a `.grad` that exists is added to in the second. What
    these kernels cannot do is left to TorchJD: aggregators without weights from the Gramian, or with forward hooks
    that ask for the matrix; Jacobians to differentiate through; all that it refuses.

    Args:
        tensors: with `.jac` fields (K, *shape).
        aggregator: any of TorchJD's.
        retain_jac: whether to keep the `.jac` fields.
        optimize_gramian_computation: is always done where it can be; TorchJD refuses it for some aggregators.

    Returns:
        The weights (K,) in the Jacobians' common dtype; None for an aggregator that TorchJD returns none of.
    """
    held = list(tensors)
    if not _takes(held, aggregator, optimize_gramian_computation):
        options: dict[str, Any] = (
            {"optimize_gramian_computation": True} if optimize_gramian_computation else {}
        )
        return _theirs(held, aggregator, retain_jac=retain_jac, **options)
    rule = as_rule(aggregator)
    stacks: list[Tensor] = [t.jac for t in held]  # type: ignore[attr-defined]
    dtype = reduce(torch.promote_types, (stack.dtype for stack in stacks))
    if isinstance(rule, Weighted):
        rule.dtype = dtype
    rows = [list(row) for row in zip(*(stack.unbind() for stack in stacks), strict=True)]
    if not retain_jac:
        for t in held:
            del t.jac  # type: ignore[attr-defined]
    weights = rule(surgery.gramian(rows))
    _accumulate(held, rows, weights)
    return weights.to(dtype) if isinstance(rule, Weighted) else None


def _takes(tensors: Sequence[Tensor], aggregator: Aggregator, optimize: bool) -> bool:
    known = isinstance(
        aggregator, (GramianWeightedAggregator, *_BLIND, aggregation.NashMTL, aggregation.ConFIG)
    )
    weighting = getattr(aggregator, "weighting", None)
    if not known or (optimize and not isinstance(aggregator, GramianWeightedAggregator)):
        return False
    if any(m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in (aggregator, weighting)):
        return False
    heights = {len(t.jac) if hasattr(t, "jac") and t.jac.ndim else 0 for t in tensors}
    return len(heights) == 1 and 0 not in heights and all(_plain(t) for t in tensors)


def _plain(t: Any) -> bool:
    writable = t.requires_grad and (t.is_leaf or t.retains_grad)
    return writable and type(t.jac) is Tensor and t.jac.dtype in FLOATS and not t.jac.requires_grad


def _accumulate(tensors: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], weights: Tensor) -> None:
    """Adds the weighted sum to the gradients that exist, and makes those that do not."""
    new = [i for i, t in enumerate(tensors) if t.grad is None]
    old = [i for i, t in enumerate(tensors) if t.grad is not None]
    made = surgery.combine([[row[i] for i in new] for row in rows], weights)
    for i, gradient in zip(new, made, strict=True):
        tensors[i].grad = gradient.to(tensors[i].dtype)
    if old:
        there: list[Tensor] = [g for i in old if (g := tensors[i].grad) is not None]
        sets = [there, *([row[i] for i in old] for row in rows)]
        surgery.combine_(sets, torch.cat([weights.new_ones(1), weights]))


def install() -> None:
    """Puts this `jac_to_grad` in TorchJD's place, for whoever looks it up in `torchjd.autojac` from now on."""
    torchjd.autojac.jac_to_grad = jac_to_grad  # type: ignore[assignment]


def uninstall() -> None:
    """Puts TorchJD's back."""
    torchjd.autojac.jac_to_grad = _theirs

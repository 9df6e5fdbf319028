"""Folds that end in a number a row: likelihoods, divergences, statistics."""

from typing import Any, cast

import torch
from torch import Tensor

from unlearn_kernels.token_loss.distances import linear_kl, linear_soft_ce
from unlearn_kernels.token_loss.lazy.deferred import asked_by_a_model, lazy_loss
from unlearn_kernels.token_loss.lazy.handle import LazyLogits, folds, is_lazy
from unlearn_kernels.token_loss.lazy.pick import NO_LABEL, in_vocabulary, logsumexp, nll, picked
from unlearn_kernels.token_loss.lazy.rows import Rows
from unlearn_kernels.token_loss.statistics import linear_maxmean, linear_stats

_REDUCTIONS = ("none", "mean", "sum")


@folds("cross_entropy")
def _cross_entropy(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    odd = (
        size_average is not None or reduce is not None or label_smoothing != 0 or reduction not in _REDUCTIONS
    )
    if odd or not is_lazy(input) or not _by_class(input.rows, "logits"):
        return NotImplemented
    if is_lazy(target):
        return NotImplemented if weight is not None else _soft(input.rows, target.rows, reduction)
    return _judged(input.rows, target, weight, ignore_index, reduction)


@folds("nll_loss")
def _nll_loss(
    input: Any,
    target: Any,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
) -> Any:
    odd = size_average is not None or reduce is not None or reduction not in _REDUCTIONS
    if odd or not is_lazy(input):
        return NotImplemented
    if _by_class(input.rows, "log_probs"):
        return _judged(input.rows, target, weight, ignore_index, reduction)
    if weight is not None or not _by_class(input.rows, "probs") or not _labels(input.rows, target):
        return NotImplemented
    # Of probabilities, as FLAT takes it: minus the label's.
    kept = target.long() != ignore_index
    values = torch.where(kept, -(-nll(input.rows, target, ignore_index)).exp(), 0.0)
    return _reduced(values, kept.sum(), reduction)


def _by_class(rows: Rows, kind: str) -> bool:
    """Whether torch would take the vocabulary for the classes."""
    return rows.kind == kind and rows.marked is None and rows.at == min(1, rows.h.dim() - 1)


def _labels(rows: Rows, target: Any) -> bool:
    whole = isinstance(target, Tensor) and not target.is_floating_point() and target.dtype != torch.bool
    return whole and target.shape == rows.h.shape[:-1] and target.device == rows.h.device


def _judged(rows: Rows, target: Any, weight: Tensor | None, ignore_index: int, reduction: str) -> Any:
    if not _labels(rows, target):
        return NotImplemented
    if weight is None and reduction != "none":
        waits = torch.is_grad_enabled() or asked_by_a_model()
        return (lazy_loss if waits else nll)(rows, target, ignore_index, reduction)
    if weight is None:
        return nll(rows, target, ignore_index)
    target = target.long()
    kept = target != ignore_index
    each = torch.where(kept, weight[torch.where(kept, target, 0)], 0.0)
    return _reduced(each * nll(rows, target, ignore_index), each.sum(), reduction)


def _reduced(values: Tensor, count: Any, reduction: str) -> Tensor:
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else values.sum() / count


def _is_constant(rows: Rows) -> bool:
    parts = (rows.h, rows.W, rows.bias)
    return not (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in parts))


def _reference(rows: Rows, of: Rows) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """A constant of the same shape, as the operators take references."""
    fits = rows.shape == of.shape and rows.at == of.at and _is_constant(rows)
    same = rows.scaled_as(of) if fits and of.softcap == rows.softcap else None
    return None if same is None else same.parts()


def _soft(rows: Rows, target: Rows, reduction: str) -> Any:
    """Cross-entropy to another's softmax, with a word lowered or taken out."""
    if target.kind != "probs" or rows.marked is not None:
        return NotImplemented
    h, W, bias = rows.parts()
    options: Any = {**rows.options(), "bias": bias, "ignore_index": NO_LABEL, "reduction": reduction}
    if target.marked is not None and target.by == torch.inf:
        own = _is_constant(target) and target.same_logits(rows) and target.shape == rows.shape
        return linear_soft_ce(h, W, target.marked, **options) if own else NotImplemented
    reference = _reference(target, rows)
    if reference is None:
        return NotImplemented
    return linear_soft_ce(h, W, target.marked, reference, beta=target.by, **options)


@folds("kl_div")
def _kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    odd = size_average is not None or reduce is not None or reduction not in ("batchmean", "sum", "mean")
    if odd or not (is_lazy(input) and is_lazy(target)):
        return NotImplemented
    p, q = cast("LazyLogits", input).rows, cast("LazyLogits", target).rows
    wanted = "log_probs" if log_target else "probs"
    if p.kind != "log_probs" or q.kind != wanted or p.marked is not None or q.marked is not None:
        return NotImplemented
    # kl_div is sum target (log target - input): a policy may be either.
    policy, other, direction = (p, q, "forward") if _is_constant(q) else (q, p, "reverse")
    reference = _reference(other, policy)
    if reference is None or (direction == "forward" and policy.shape != other.shape):
        return NotImplemented
    h, W, bias = policy.parts()
    options: Any = {**policy.options(), "bias": bias, "direction": direction, "reduction": "sum"}
    total = linear_kl(h, W, reference, **options)
    if reduction == "sum":
        return total
    return total / (p.shape[0] if reduction == "batchmean" else p.words * (p.h.numel() // p.h.shape[-1]))


@folds("take_along_dim")
def _take(x: Any, indices: Any, dim: Any = None) -> Any:
    return _gather(x, dim, indices)


@folds("gather")
def _gather(x: Any, dim: Any, index: Any, **options: Any) -> Any:
    if options or not is_lazy(x) or not isinstance(index, Tensor) or not isinstance(dim, int):
        return NotImplemented
    rows = x.rows
    fits = rows.last and rows.marked is None and rows.kind != "one_hot" and dim % rows.h.dim() == rows.at
    if not fits or index.shape != (*rows.h.shape[:-1], 1):
        return NotImplemented
    return picked(rows, in_vocabulary(rows, index.squeeze(-1))).unsqueeze(-1)


def _over_words(x: Any, dim: Any, *kinds: str) -> bool:
    if not is_lazy(x) or x.rows.kind not in kinds or x.rows.marked is not None:
        return False
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim % x.rows.h.dim() == x.rows.at


def _kept(value: Tensor, x: LazyLogits, keepdim: bool) -> Tensor:
    return value.unsqueeze(x.rows.at) if keepdim else value


@folds("logsumexp")
def _logsumexp(x: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if options or not _over_words(x, dim, "logits"):
        return NotImplemented
    return _kept(logsumexp(x.rows), x, keepdim)


@folds("argmax")
def _argmax(x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if not _over_words(x, dim, "logits", "log_probs", "probs"):
        return NotImplemented
    return _kept(_statistics(x.rows).argmax, x, keepdim)


def _statistics(rows: Rows) -> Any:
    h, W, bias = rows.constant().parts()
    return linear_stats(h, W, None, **{**rows.options(), "bias": bias})


def _max_mean(rows: Rows) -> Any:
    h, W, bias = rows.parts()
    return linear_maxmean(h, W, None, **{**rows.options(), "bias": bias})


@folds("max")
def _max(x: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if options or not _over_words(x, dim, "logits"):
        return NotImplemented
    values, words = _max_mean(x.rows).max.to(x.rows.dtype), _statistics(x.rows).argmax
    return torch.return_types.max((_kept(values, x, keepdim), _kept(words, x, keepdim)))


@folds("amax")
def _amax(x: Any, dim: Any = (), keepdim: bool = False, **options: Any) -> Any:
    if options or not _over_words(x, dim, "logits"):
        return NotImplemented
    return _kept(_max_mean(x.rows).max.to(x.rows.dtype), x, keepdim)


@folds("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False, **options: Any) -> Any:
    if options or not _over_words(x, dim, "logits"):
        return NotImplemented
    return _kept(_max_mean(x.rows).mean.to(x.rows.dtype), x, keepdim)

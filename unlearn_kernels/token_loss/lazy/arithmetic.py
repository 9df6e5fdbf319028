"""Folds of scalar arithmetic: temperatures and soft-caps, softmaxes, sparse tensors and lowered logits."""

import math
from typing import Any

import torch
from torch import Tensor

from unlearn_kernels.token_loss.lazy.handle import LazyLogits, folds, is_lazy, lazy
from unlearn_kernels.token_loss.lazy.pick import in_vocabulary
from unlearn_kernels.token_loss.lazy.rows import Kind


def _number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


@folds("mul", "multiply", "__mul__", "__rmul__")
def _mul(x: Any, factor: Any, **options: Any) -> Any:
    if not is_lazy(x):
        x, factor = factor, x
    return NotImplemented if options or not _number(factor) else _scaled(x, float(factor))


@folds("div", "divide", "true_divide", "__truediv__")
def _div(x: Any, divisor: Any, **options: Any) -> Any:
    if options or not is_lazy(x) or not _number(divisor) or divisor == 0:
        return NotImplemented
    return _scaled(x, 1 / divisor)


@folds("neg", "negative", "__neg__")
def _neg(x: Any) -> Any:
    return _scaled(x, -1.0)


def _scaled(x: LazyLogits, factor: float) -> Any:
    rows = x.rows
    if rows.kind == "one_hot":
        return lazy(rows.but(by=factor * rows.by))
    if rows.kind != "logits" or rows.marked is not None or not math.isfinite(factor):
        return NotImplemented
    if rows.softcap is None:
        return lazy(rows.but(scale=factor * rows.scale))
    # cap tanh(scale x / cap), times a factor, with the argument as it was.
    cap = factor * rows.softcap
    return lazy(rows.but(softcap=cap, scale=factor * rows.scale)) if cap > 0 else NotImplemented


@folds("tanh")
def _tanh(x: Any) -> Any:
    rows = x.rows
    capped = rows.kind != "logits" or rows.softcap is not None or rows.marked is not None
    return NotImplemented if capped else lazy(rows.but(softcap=1.0))


@folds("softmax")
def _softmax(x: Any, dim: Any = None, *rest: Any, dtype: Any = None, **_: Any) -> Any:
    return _normalised(x, dim, "probs", dtype, *rest)


@folds("log_softmax")
def _log_softmax(x: Any, dim: Any = None, *rest: Any, dtype: Any = None, **_: Any) -> Any:
    return _normalised(x, dim, "log_probs", dtype, *rest)


def _normalised(x: Any, dim: Any, kind: Kind, *rest: Any) -> Any:
    """`rest` is a dtype by name, and by position, after `_stacklevel` or not."""
    rows, dtype = x.rows, next((i for i in rest if isinstance(i, torch.dtype)), None)
    if rows.kind != "logits" or dim is None or dim % rows.h.dim() != rows.at:
        return NotImplemented
    return lazy(rows.but(kind=kind, dtype=dtype or rows.dtype))


@folds("exp")
def _exp(x: Any) -> Any:
    return lazy(x.rows.but(kind="probs")) if x.rows.kind == "log_probs" else NotImplemented


@folds("log")
def _log(x: Any) -> Any:
    return lazy(x.rows.but(kind="log_probs")) if x.rows.kind == "probs" else NotImplemented


@folds("zeros_like")
def _zeros_like(x: Any, **options: Any) -> Any:
    rows = x.rows
    known = {"dtype": rows.dtype, "device": rows.h.device, "requires_grad": False, "layout": None}
    if rows.kind == "one_hot" or any(value not in (None, known.get(key)) for key, value in options.items()):
        return NotImplemented
    plain = rows.but(h=rows.h.detach(), W=rows.W.detach(), bias=None, marked=None, by=0.0)
    return lazy(plain.but(kind="one_hot"))


@folds("__setitem__")
def _setitem(x: Any, index: Any, value: Any) -> Any:
    """`zeros[batch, position, labels] = number`, a word of every row."""
    if not is_lazy(x) or not _blank(x) or not _number(value) or not isinstance(index, tuple):
        return NotImplemented
    rows, lead = x.rows, x.rows.h.shape[:-1]
    if len(index) != rows.h.dim() or not all(
        isinstance(i, Tensor) and not i.is_floating_point() for i in index
    ):
        return NotImplemented
    *places, words = index
    if words.shape == (*lead, 1) and all(_counts(i, n, lead) for n, i in enumerate(places)):
        x.rows = rows.but(marked=in_vocabulary(rows, words.squeeze(-1), -rows.words), by=float(value))
        return None
    return NotImplemented


def _blank(x: LazyLogits) -> bool:
    rows = x.rows
    return x.fresh and x.made is None and rows.last and rows.kind == "one_hot" and rows.marked is None


def _counts(index: Tensor, dim: int, lead: torch.Size) -> bool:
    """Whether it is `arange` along one dimension of (*lead, 1)."""
    shape = [1] * (len(lead) + 1)
    shape[dim] = lead[dim]
    return list(index.shape) == shape and index.flatten().tolist() == list(range(lead[dim]))


@folds("scatter")
def _scatter(x: Any, dim: int, index: Tensor, value: Any = None, **options: Any) -> Any:
    rows = NotImplemented if options else _set_words(x, dim, index, value)
    return rows if rows is NotImplemented else lazy(rows)


@folds("scatter_")
def _scatter_(x: Any, dim: int, index: Tensor, value: Any = None, **options: Any) -> Any:
    known = is_lazy(x) and x.fresh and x.made is None and not options
    rows = NotImplemented if not known else _set_words(x, dim, index, value)
    if rows is not NotImplemented:
        x.rows, rows = rows, x
    return rows


def _set_words(x: Any, dim: int, index: Any, value: Any) -> Any:
    """A word of every row set to a number: of zeros, or minus infinity of logits."""
    if not is_lazy(x) or not isinstance(index, Tensor) or not _number(value):
        return NotImplemented
    rows = x.rows
    fits = rows.last and rows.marked is None and dim % rows.h.dim() == rows.at
    if not fits or index.shape != (*rows.h.shape[:-1], 1):
        return NotImplemented
    if rows.kind != "one_hot" and (rows.kind != "logits" or value != -math.inf):
        return NotImplemented
    words = in_vocabulary(rows, index.squeeze(-1))
    return rows.but(marked=words, by=float(value) if rows.kind == "one_hot" else math.inf)


@folds("sub", "subtract", "__sub__")
def _sub(x: Any, other: Any, **options: Any) -> Any:
    return NotImplemented if options else _lowered(x, other, 1.0)


@folds("add", "__add__")
def _add(x: Any, other: Any, **options: Any) -> Any:
    return NotImplemented if options else _lowered(x, other, -1.0)


def _lowered(x: Any, other: Any, sign: float) -> Any:
    """Logits minus a sparse tensor."""
    if not (is_lazy(x) and is_lazy(other)) or x.rows.kind != "logits" or other.rows.kind != "one_hot":
        return NotImplemented
    rows, sparse = x.rows, other.rows
    if rows.marked is not None or rows.shape != sparse.shape or rows.at != sparse.at:
        return NotImplemented
    return lazy(rows.but(marked=sparse.marked, by=sign * sparse.by))

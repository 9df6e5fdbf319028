"""Folds that leave the vocabulary whole: slices, views, permutations, casts, copies."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from unlearn_kernels.token_loss.lazy.handle import LazyLogits, folds, is_lazy, lazy, plain_view, view
from unlearn_kernels.token_loss.lazy.pick import columns, in_vocabulary, picked
from unlearn_kernels.token_loss.lazy.rows import Rows

_ALL = slice(None)


@folds("__getitem__")
def _getitem(x: Any, index: Any) -> Any:
    if not is_lazy(x) or not x.rows.last:
        return NotImplemented
    index = tuple(_entry(i) for i in (index if isinstance(index, tuple) else (index,)))
    rows, items = x.rows, _expanded(index, x.rows.h.dim())
    if items is None:
        return NotImplemented
    *lead, word = items
    if not isinstance(word, slice):
        return _words(x, lead, word)
    if word.indices(rows.words) != (0, rows.words, 1):
        return NotImplemented
    found = rows.moved(lambda t: t[tuple([*lead, _ALL])])
    if _one_position(lead, rows):
        return plain_view(x, found.dense)
    return lazy(found) if _copies(lead) else view(x, found)


def _entry(i: Any) -> Any:
    """Lists and NumPy's arrays as tensors; what has no dimensions as a number."""
    nested = isinstance(i, list) and any(isinstance(j, (list, slice)) for j in i)
    if (isinstance(i, list) and not nested) or (hasattr(i, "__array__") and not isinstance(i, Tensor)):
        i = torch.as_tensor(i)
    return i.item() if isinstance(i, Tensor) and i.dim() == 0 and not _is_mask(i) else i


def _expanded(index: tuple[Any, ...], dims: int) -> list[Any] | None:
    """One entry for every dimension and None; None if the vocabulary is not the last entry of its own."""
    if any(isinstance(i, (bool, list)) or (_is_mask(i) and i.dim() == 0) for i in index):
        return None
    # `in` and `count` would compare tensors.
    uses = [0 if i is None or i is Ellipsis else i.dim() if _is_mask(i) else 1 for i in index]
    rest = [_ALL] * (dims - sum(uses))
    gaps = [n for n, i in enumerate(index) if i is Ellipsis]
    items = [*index[: gaps[0]], *rest, *index[gaps[0] + 1 :]] if gaps and len(gaps) == 1 else [*index, *rest]
    bad = len(gaps) > 1 or not items or items[-1] is None or _is_mask(items[-1]) or sum(uses) > dims
    return None if bad else items


def _is_mask(i: Any) -> bool:
    return isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)


def _copies(lead: Sequence[Any]) -> bool:
    return any(isinstance(i, Tensor) for i in lead)


def _one_position(lead: Sequence[Any], rows: Rows) -> bool:
    """A position of every sequence, as generation reads it: (B, V), which is no cost to speak of."""
    whole = len(lead) == 2 and isinstance(lead[0], slice) and rows.h.dim() == 3
    return whole and isinstance(lead[1], int) and rows.kind == "logits"


def _words(x: LazyLogits, lead: Sequence[Any], word: Any) -> Any:
    """Single words of rows: one everywhere, or one for each row."""
    rows = x.rows
    if rows.marked is not None:
        return NotImplemented
    if isinstance(word, int):
        found = rows.but(h=rows.h[tuple([*lead, _ALL])])
        words = in_vocabulary(rows, torch.tensor(word, device=rows.h.device), -rows.words)
        pick = lambda: picked(found, words.expand(found.h.shape[:-1]))  # noqa: E731
        return pick() if _copies(lead) else plain_view(x, pick)
    if not isinstance(word, Tensor) or word.is_floating_point():
        return NotImplemented
    if all(isinstance(i, slice) and i == _ALL for i in lead):
        return columns(rows, word.to(rows.h.device)) if word.dim() == 1 else NotImplemented
    if not all(isinstance(i, (int, Tensor)) and not _is_mask(i) for i in lead):
        return NotImplemented
    indices = torch.broadcast_tensors(*(torch.as_tensor(i, device=rows.h.device) for i in (*lead, word)))
    words = in_vocabulary(rows, indices[-1], -rows.words)
    return picked(rows.but(h=rows.h[tuple(indices[:-1])]), words)


@folds("view", "reshape")
def _reshape(x: Any, *shape: Any, **named: Any) -> Any:
    wanted = shape[0] if shape and not isinstance(shape[0], int) else shape
    if named or not is_lazy(x) or isinstance(wanted, torch.dtype):
        return NotImplemented
    return _reshaped(x, tuple(wanted))


def _reshaped(x: LazyLogits, shape: tuple[int, ...]) -> Any:
    rows = x.rows
    if shape == tuple(rows.shape):
        return view(x, rows)
    if not rows.last or not shape:
        return NotImplemented
    *lead, words = shape
    if words == -1 and math.prod(lead) == math.prod(rows.h.shape[:-1]):
        words = rows.words
    if words != rows.words:
        return NotImplemented
    return view(x, rows.moved(lambda t: t.reshape(*lead, t.shape[-1])))


@folds("view_as", "reshape_as")
def _as(x: Any, other: Tensor) -> Any:
    return _reshaped(x, tuple(other.shape)) if is_lazy(x) else NotImplemented


@folds("flatten")
def _flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    shape, n = x.rows.shape, x.rows.h.dim()
    first, last = start_dim % n, end_dim % n
    return _reshaped(x, (*shape[:first], math.prod(shape[first : last + 1]), *shape[last + 1 :]))


@folds("unsqueeze")
def _unsqueeze(x: Any, dim: int) -> Any:
    n = x.rows.h.dim() + 1
    shape = list(x.rows.shape)
    shape.insert(dim % n, 1)
    return _reshaped(x, tuple(shape)) if dim % n != n - 1 else NotImplemented


@folds("squeeze")
def _squeeze(x: Any, dim: Any = None) -> Any:
    rows = x.rows
    if isinstance(dim, (tuple, list)):
        return NotImplemented
    drop = range(rows.h.dim() - 1) if dim is None else [dim % rows.h.dim()]
    shape = tuple(size for i, size in enumerate(rows.shape) if i not in drop or size != 1)
    return _reshaped(x, shape)


@folds("permute")
def _permute(x: Any, *dims: Any) -> Any:
    order = dims[0] if dims and not isinstance(dims[0], int) else dims
    rows, n = x.rows, x.rows.h.dim()
    order = [d % n for d in order]
    if sorted(order) != list(range(n)):
        return NotImplemented
    lead = [d if d < rows.at else d - 1 for d in order if d != rows.at]
    return view(x, rows.moved(lambda t: t.permute(*lead, n - 1), at=order.index(rows.at)))


@folds("transpose", "swapaxes", "swapdims")
def _transpose(x: Any, dim0: int, dim1: int) -> Any:
    order = list(range(x.rows.h.dim()))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(x, order)


@folds("get.mT")
def _swap_last(x: Any, *_: Any) -> Any:
    return _transpose(x, -1, -2) if x.rows.h.dim() > 1 else NotImplemented


@folds("get.T", "t")
def _matrix(x: Any, *_: Any) -> Any:
    return _transpose(x, 0, 1) if x.rows.h.dim() == 2 else NotImplemented


@folds("movedim", "moveaxis")
def _movedim(x: Any, source: Any, destination: Any) -> Any:
    if not isinstance(source, int) or not isinstance(destination, int):
        return NotImplemented
    n = x.rows.h.dim()
    order = [d for d in range(n) if d != source % n]
    order.insert(destination % n, source % n)
    return _permute(x, order)


def _lead(x: LazyLogits, dim: int) -> int | None:
    """Which dimension of the hidden states it is, if it is not the vocabulary."""
    rows, dim = x.rows, dim % x.rows.h.dim()
    return None if dim == rows.at or not rows.last else dim


@folds("select")
def _select(x: Any, dim: int, index: int) -> Any:
    at = _lead(x, dim)
    return NotImplemented if at is None else _getitem(x, (*[_ALL] * at, index))


@folds("narrow")
def _narrow(x: Any, dim: int, start: Any, length: int) -> Any:
    at = _lead(x, dim)
    return NotImplemented if at is None else view(x, x.rows.moved(lambda t: t.narrow(at, start, length)))


@folds("index_select")
def _index_select(x: Any, dim: int, index: Tensor) -> Any:
    at = _lead(x, dim)
    return NotImplemented if at is None else lazy(x.rows.moved(lambda t: t.index_select(at, index)))


@folds("unbind")
def _unbind(x: Any, dim: int = 0) -> Any:
    return _parts(x, dim, lambda t, at: t.unbind(at))


@folds("__iter__")
def _iter(x: Any) -> Any:
    parts = _unbind(x)
    return parts if parts is NotImplemented else iter(parts)


@folds("split")
def _split(x: Any, size: Any, dim: int = 0) -> Any:
    return _parts(x, dim, lambda t, at: t.split(size, at))


@folds("chunk")
def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return _parts(x, dim, lambda t, at: t.chunk(chunks, at))


def _parts(x: LazyLogits, dim: int, cut: Callable[[Tensor, int], Sequence[Tensor]]) -> Any:
    at = _lead(x, dim)
    if at is None or x.rows.marked is not None:
        return NotImplemented
    return tuple(view(x, x.rows.but(h=h, at=h.dim() - 1)) for h in cut(x.rows.h, at))


@folds("contiguous")
def _contiguous(x: Any, **_: Any) -> Any:
    x.fresh = False
    return x


@folds("clone")
def _clone(x: Any, **_: Any) -> Any:
    return lazy(x.rows)


@folds("detach", "get.data")
def _detach(x: Any, *_: Any) -> Any:
    made, hanging = view(x, x.rows.constant()), not torch.is_grad_enabled() and x.requires_grad
    made.source = x.rows if hanging else None
    return made


@folds("to")
def _to(x: Any, *args: Any, **options: Any) -> Any:
    copy = options.pop("copy", False)
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, *_ = torch._C._nn._parse_to(*args, **options)
    return _cast(x, device, dtype, copy)


@folds("type_as")
def _type_as(x: Any, other: Tensor) -> Any:
    return _cast(x, other.device, other.dtype, False) if is_lazy(x) else NotImplemented


@folds("cpu")
def _cpu(x: Any, **_: Any) -> Any:
    return _cast(x, "cpu", None, False)


@folds("cuda")
def _cuda(x: Any, device: Any = None, **_: Any) -> Any:
    return _cast(x, "cuda" if device is None else device, None, False)


def _cast_to(name: str, dtype: torch.dtype) -> None:
    folds(name)(lambda x, **_: _cast(x, None, dtype, False))


for _dtype_name in ("float", "double", "half", "bfloat16"):
    _cast_to(_dtype_name, getattr(torch, _dtype_name))


def _cast(x: LazyLogits, device: Any, dtype: torch.dtype | None, copy: bool) -> Any:
    rows = x.rows
    dtype = rows.dtype if dtype is None else dtype
    device = rows.h.device if device is None else torch.device(device)
    moves = device.type != rows.h.device.type or device.index not in (None, rows.h.device.index)
    if not dtype.is_floating_point or moves:
        return NotImplemented
    if dtype == rows.dtype and not copy:
        x.fresh = False
        return x
    return lazy(rows.but(dtype=dtype))

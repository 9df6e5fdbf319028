"""The lazy tensor: a subclass that folds what it knows into the operators and makes itself for the rest."""

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unlearn_kernels.token_loss.lazy.changes import Lent, counting
from unlearn_kernels.token_loss.lazy.hung import through, watched, watches
from unlearn_kernels.token_loss.lazy.names import HOOKS, KNOWN, METADATA, name_of, writes
from unlearn_kernels.token_loss.lazy.rows import Rows

# By the names under which torch functions and methods arrive; NotImplemented is what a fold returns to pass.
FOLDS: Final[dict[str, Callable[..., Any]]] = {}


def folds(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a fold."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def fold(*args: Any, **kwargs: Any) -> Any:
            try:
                signature.bind(*args, **kwargs)
            except TypeError:  # a way of calling that the fold does not know
                return NotImplemented
            return function(*args, **kwargs)

        for name in names:
            FOLDS[name] = fold
        return function

    return add


class LazyLogits(Tensor):
    """Logits (or their softmax) as hidden states and a head, which losses fold into operators without logits.

    It has the shape, dtype and device of the tensor it stands for, and may go wherever a tensor goes. What is
    neither a fold nor metadata makes the tensor, once, or raises under `strict`.

    Attributes:
        source: what it was detached from, where gradients are off: an autograd function may make it its output.
        fresh: whether nothing else shares its memory in eager PyTorch, so that it may be written to.
        made: the tensor, once it had to be made.
        lent: of it and its views, what is in memory.
    """

    _rows: Rows
    _node: Any
    _own: Tensor | None
    source: Rows | None
    fresh: bool
    made: Tensor | None
    lent: Lent

    @property
    def rows(self) -> Rows:
        """What it stands for.

        Raises:
            RuntimeError: if it came out of an autograd function, or its parts or a view of it were written to.
        """
        with torch._C.DisableTorchFunctionSubclass():
            node = self.grad_fn
        if node is not self._node:
            with torch.enable_grad():
                self._rows, self._node = through(self.source, node), node
        self.lent.check(self._own)
        return self._rows.unchanged()

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._rows, self.source, self.made, self._own = rows, None, None, None

    @property
    def settled(self) -> bool:
        """Whether `made` counts in place of `rows`: one of them has been written to."""
        if self._own is None:
            return False
        return any(x is self._own for x in self.lent.written()) or self._rows.changed() is not None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Metadata, a fold, or the tensor itself."""
        kwargs = kwargs or {}
        name = name_of(func)
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy = [x for x in pytree.tree_leaves((args, kwargs), is_leaf=is_lazy) if is_lazy(x)]
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name}: lazy logits cannot enter a transform of torch.func; give it .dense()"
            )
        if name == "register_hook" and watches(args[-1]):
            if not lazy[0].settled:
                lazy[0].rows, handle = watched(lazy[0].rows, args[-1])
                return handle
        elif name in HOOKS or (name == "grad" and any(is_lazy(x) for x in args[1])):
            raise RuntimeError(
                f"{name}: lazy logits never have a gradient; use that of .dense() or the hidden states"
            )
        if not any(x.settled for x in lazy):
            found = FOLDS[name](*args, **kwargs) if name in FOLDS else NotImplemented
            if found is not NotImplemented:
                return found
        return _made(name, func, lazy, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What comes from below Python: autograd is above, so the numbers will do."""
        lazy = [x for x in pytree.tree_leaves((args, kwargs), is_leaf=is_lazy) if is_lazy(x)]
        _refuse(str(func), lazy)
        with torch.no_grad():
            args, kwargs = _dense((args, kwargs or {}), Tensor.detach)
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The tensor that this stands for, made now, under `strict` too; differentiable."""
        if self.made is None:
            rows = self.rows
            with counting(self.requires_grad):
                made = rows.dense()
            self.made, self._own = made, self.lent.add(made)
        self.lent.check(self._own)
        return self.made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        rows = self._rows
        return f"LazyLogits({rows.kind}, shape={rows.shape}, dtype={rows.dtype}, device='{rows.h.device}')"


class _Link(torch.autograd.Function):
    """Ties a lazy tensor to the history of its parts, for whoever searches the graph, such as DDP."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *parts: Tensor | None) -> Tensor:
        ctx.rows = rows
        return _bare(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = ctx.rows.unchanged()
        parts = [rows.h, rows.W, rows.bias]
        wanted = [x for x, need in zip(parts, ctx.needs_input_grad[1:], strict=True) if need]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(rows.dense(), wanted, grad))
        return None, *[next(found) if need else None for need in ctx.needs_input_grad[1:]]


def _bare(rows: Rows) -> Tensor:
    return Tensor._make_wrapper_subclass(LazyLogits, rows.shape, dtype=rows.dtype, device=rows.h.device)


def lazy(rows: Rows, fresh: bool = True) -> LazyLogits:
    """A lazy tensor of these rows; a constant one where gradients are off."""
    rows = rows if torch.is_grad_enabled() else rows.constant()
    parts = (rows.h, rows.W, rows.bias)
    linked = rows.kind != "one_hot" and any(x is not None and x.requires_grad for x in parts)
    made: Any = _Link.apply(rows, *parts) if linked else _bare(rows)
    with torch._C.DisableTorchFunctionSubclass():
        made._node = made.grad_fn
    made.rows, made.fresh, made.lent = rows, fresh, Lent()
    return made


def view(of: LazyLogits, rows: Rows) -> LazyLogits:
    """A lazy tensor that shares another's memory in eager PyTorch."""
    made = lazy(rows, fresh=False)
    of.fresh, made.lent = False, of.lent
    return made


def plain_view(of: LazyLogits, make: Callable[[], Tensor]) -> Tensor:
    """A plain tensor that shares another's memory in eager PyTorch: the other raises once it is written to."""
    of.fresh = False
    with counting(torch.is_grad_enabled()):
        made = make()
    of.lent.add(made)
    return made


def is_lazy(x: Any) -> bool:
    """Whether it is a lazy tensor."""
    return isinstance(x, LazyLogits)


def _refuse(name: str, lazy: list[LazyLogits]) -> None:
    strict = [x._rows for x in lazy if x._rows.strict and x.made is None]
    if strict:
        raise RuntimeError(
            f"lazy_logits(strict=True): {name} needs {strict[0].kind} of shape {strict[0].shape} in memory, "
            f"{strict[0].dtype}; use what is known without them ({KNOWN}), call .dense() where they are wanted, or "
            "leave strict off"
        )


def _dense(values: Any, use: Callable[[Tensor], Tensor] = lambda x: x) -> Any:
    return pytree.tree_map(lambda x: use(x.dense()) if is_lazy(x) else x, values, is_leaf=is_lazy)


def _made(name: str, func: Callable[..., Any], lazy: list[LazyLogits], args: Any, kwargs: Any) -> Any:
    """The function of tensors that are in memory; one that writes, writes to what only the lazy tensor holds."""
    _refuse(name, lazy)
    if "out" in kwargs and is_lazy(kwargs["out"]):
        raise RuntimeError(f"{name}: lazy logits cannot be an output")
    if not (writes(name) and args and is_lazy(args[0])):
        args, kwargs = _dense((args, kwargs))
        return func(*args, **kwargs)
    target: LazyLogits = args[0]
    if not target.fresh:
        raise RuntimeError(f"{name}: lazy logits that others share cannot be written to; clone() them first")
    args, kwargs = _dense((args, kwargs))
    func(*args, **kwargs)
    torch.autograd.graph.increment_version(target.dense())
    return None if name == "__setitem__" else target


def _flatten(x: LazyLogits) -> tuple[list[Any], Any]:
    return ([x.dense()], None) if x.settled else ([x.rows.h], x.rows)


def _unflatten(parts: Any, rows: Any) -> Any:
    (part,) = parts
    return part if rows is None or not isinstance(part, Tensor) else lazy(rows.but(h=part), fresh=False)


# DDP and FSDP hang their hooks on what a model's output flattens to.
pytree.register_pytree_node(
    LazyLogits, _flatten, _unflatten, serialized_type_name="unlearn_kernels.LazyLogits"
)

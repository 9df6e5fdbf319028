"""The lazy tensor: a subclass that folds what it knows into the operators and makes itself for the rest."""

import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unlearn_kernels.token_loss.lazy.hung import through, watched, watches
from unlearn_kernels.token_loss.lazy.rows import Rows

# By the names under which torch functions and methods arrive; NotImplemented is what a fold returns to pass.
FOLDS: Final[dict[str, Callable[..., Any]]] = {}

# What is known without logits.
_METHODS: Final = {
    *(
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "stride",
        "is_contiguous",
        "element_size",
        "get_device",
    ),
    *("is_floating_point", "is_complex", "is_signed", "is_inference", "is_same_size", "__len__", "__hash__"),
    *("data_ptr", "untyped_storage"),  # raise: there is none
}
_PROPERTIES: Final = {
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "names",
        "itemsize",
        "nbytes",
        "is_leaf",
        "is_cpu",
        "is_cuda",
    ),
    *("is_meta", "is_mps", "is_xpu", "is_sparse", "is_mkldnn", "is_vulkan", "is_nested", "is_quantized"),
    *("requires_grad", "grad_fn", "grad", "output_nr", "_version", "_base", "_backward_hooks"),
}
_METADATA: Final = _METHODS | {f"get.{name}" for name in _PROPERTIES}
_WRITES: Final = {
    f"__{name}__"
    for name in (
        "setitem",
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "ifloordiv",
        "ipow",
        "imod",
        "iand",
        "ior",
        "ixor",
    )
}
_HOOKS: Final = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}
_KNOWN: Final = (
    "slices, views, casts, cross_entropy, nll_loss, kl_div, (log_)softmax with gather, "
    "logsumexp, argmax, max, mean"
)


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
        written: whether `made` has been written to and counts in place of `rows`.
    """

    _rows: Rows
    source: Rows | None
    fresh: bool
    made: Tensor | None
    written: bool

    @property
    def rows(self) -> Rows:
        """What it stands for."""
        if self.source is not None and self.grad_fn is not None:
            source, self.source = self.source, None
            with torch.enable_grad():
                self._rows = through(source, self.grad_fn)
        return self._rows

    @rows.setter
    def rows(self, rows: Rows) -> None:
        self._rows, self.source = rows, None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Metadata, a fold, or the tensor itself."""
        kwargs = kwargs or {}
        name = _name(func)
        if name in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        lazy = [x for x in pytree.tree_leaves((args, kwargs), is_leaf=is_lazy) if is_lazy(x)]
        if name in _HOOKS:
            if name == "register_hook" and watches(args[-1]):
                lazy[0].rows, handle = watched(lazy[0].rows, args[-1])
                return handle
            raise RuntimeError(f"{name}: lazy logits never have a gradient; hook the hidden states")
        if not any(x.written for x in lazy):
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
            args, kwargs = _dense((args, kwargs or {}))
        return func(*args, **kwargs)

    def dense(self) -> Tensor:
        """The tensor that this stands for, made now, under `strict` too; differentiable."""
        stale = torch.is_grad_enabled() and self.made is not None and not self.made.requires_grad
        if self.made is None or (stale and not self.written and self.requires_grad):
            self.made = self.rows.dense()
        return self.made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        rows = self.rows
        return f"LazyLogits({rows.kind}, shape={rows.shape}, dtype={rows.dtype}, device='{rows.h.device}')"


class _Link(torch.autograd.Function):
    """Ties a lazy tensor to the history of its parts, for whoever searches the graph, such as DDP."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *parts: Tensor | None) -> Tensor:
        ctx.rows = rows
        return _bare(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts = [ctx.rows.h, ctx.rows.W, ctx.rows.bias]
        wanted = [x for x, need in zip(parts, ctx.needs_input_grad[1:], strict=True) if need]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.rows.dense(), wanted, grad))
        return None, *[next(found) if need else None for need in ctx.needs_input_grad[1:]]


def _bare(rows: Rows) -> Tensor:
    return Tensor._make_wrapper_subclass(LazyLogits, rows.shape, dtype=rows.dtype, device=rows.h.device)


def lazy(rows: Rows, fresh: bool = True) -> LazyLogits:
    """A lazy tensor of these rows; a constant one where gradients are off."""
    rows = rows if torch.is_grad_enabled() else rows.constant()
    parts = (rows.h, rows.W, rows.bias)
    linked = rows.kind != "one_hot" and any(x is not None and x.requires_grad for x in parts)
    made: Any = _Link.apply(rows, *parts) if linked else _bare(rows)
    made.rows, made.fresh, made.made, made.written = rows, fresh, None, False
    return made


def view(of: LazyLogits, rows: Rows) -> LazyLogits:
    """A lazy tensor that shares another's memory in eager PyTorch."""
    of.fresh = False
    return lazy(rows, fresh=False)


def is_lazy(x: Any) -> bool:
    """Whether it is a lazy tensor."""
    return isinstance(x, LazyLogits)


def _name(func: Callable[..., Any]) -> str:
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return f"{name.strip('_')}.{owner.__name__}" if name in ("__get__", "__set__") and owner else name


def _refuse(name: str, lazy: list[LazyLogits]) -> None:
    strict = [x.rows for x in lazy if x.rows.strict and x.made is None]
    if strict:
        raise RuntimeError(
            f"lazy_logits(strict=True): {name} needs {strict[0].kind} of shape {strict[0].shape} in memory, "
            f"{strict[0].dtype}; use what is known without them ({_KNOWN}), call .dense() where they are wanted, or "
            "leave strict off"
        )


def _dense(values: Any) -> Any:
    return pytree.tree_map(lambda x: x.dense() if is_lazy(x) else x, values, is_leaf=is_lazy)


def _made(name: str, func: Callable[..., Any], lazy: list[LazyLogits], args: Any, kwargs: Any) -> Any:
    """The function of tensors that are in memory; one that writes, writes to what only the lazy tensor holds."""
    _refuse(name, lazy)
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__")) or name.startswith("set.")
    if "out" in kwargs and is_lazy(kwargs["out"]):
        raise RuntimeError(f"{name}: lazy logits cannot be an output")
    if not (in_place and args and is_lazy(args[0])):
        args, kwargs = _dense((args, kwargs))
        return func(*args, **kwargs)
    target: LazyLogits = args[0]
    if not target.fresh:
        raise RuntimeError(f"{name}: lazy logits that others share cannot be written to; clone() them first")
    args, kwargs = _dense((args, kwargs))
    func(*args, **kwargs)
    target.written = True
    return None if name == "__setitem__" else target


def _flatten(x: LazyLogits) -> tuple[list[Any], Any]:
    return ([x.made], None) if x.written else ([x.rows.h], x.rows)


def _unflatten(parts: Any, rows: Any) -> Any:
    (part,) = parts
    return part if rows is None or not isinstance(part, Tensor) else lazy(rows.but(h=part), fresh=False)


# DDP and FSDP hang their hooks on what a model's output flattens to.
pytree.register_pytree_node(
    LazyLogits, _flatten, _unflatten, serialized_type_name="unlearn_kernels.LazyLogits"
)

"""Losses that wait until somebody looks: models compute one from labels whether or not it is used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unlearn_kernels.token_loss.lazy.hung import watched, watches
from unlearn_kernels.token_loss.lazy.pick import nll
from unlearn_kernels.token_loss.lazy.rows import Rows

_METADATA = {
    "get.shape",
    "get.dtype",
    "get.device",
    "get.requires_grad",
    "get.ndim",
    "get.grad_fn",
    "get.is_leaf",
}


class LazyLoss(Tensor):
    """A sum or mean of likelihoods, computed with its gradients when it is first used, and never if it is not.

    Attributes:
        rows: the logits.
        judged: labels, ignored label and reduction.
        differentiable: whether gradients were enabled when it was asked for.
        made: the number, once it was used.
    """

    rows: Rows
    judged: tuple[Tensor, int, str]
    differentiable: bool
    made: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Metadata, or the number itself."""
        owner = getattr(func, "__self__", None)
        if func.__name__ in ("size", "dim") or f"get.{getattr(owner, '__name__', '')}" in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if func.__name__ == "register_hook" and args[0].made is None and watches(args[-1]):
            args[0].rows, handle = watched(args[0].rows, args[-1])
            return handle
        args, kwargs = _numbers((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What comes from below Python."""
        args, kwargs = _numbers((args, kwargs or {}))
        return func(*args, **kwargs)

    def number(self) -> Tensor:
        """The loss, differentiable."""
        if self.made is None:
            with torch.set_grad_enabled(self.differentiable):
                self.made = nll(self.rows, *self.judged)
        return self.made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.number())


class _Link(torch.autograd.Function):
    """Ties a lazy loss to the history of its parts."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], rows: Rows, judged: Any, *_: Tensor | None) -> Tensor:
        ctx.rows, ctx.judged = rows, judged
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        parts, needed = (ctx.rows.h, ctx.rows.W, ctx.rows.bias), ctx.needs_input_grad[3:]
        wanted = [x for x, need in zip(parts, needed, strict=True) if need]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(nll(ctx.rows, *ctx.judged), wanted, grad))
        return None, None, None, *[next(found) if need else None for need in needed]


def lazy_loss(rows: Rows, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """`nll` of these, when it is needed."""
    wide = torch.promote_types(torch.promote_types(rows.h.dtype, rows.dtype), torch.float32)

    def make() -> Tensor:
        return Tensor._make_wrapper_subclass(LazyLoss, (), dtype=wide, device=rows.h.device)

    parts, judged = (rows.h, rows.W, rows.bias), (labels, ignore_index, reduction)
    grad = torch.is_grad_enabled()
    linked = grad and any(x is not None and x.requires_grad for x in parts)
    loss: Any = _Link.apply(make, rows, judged, *parts) if linked else make()
    loss.rows, loss.judged, loss.differentiable, loss.made = rows, judged, grad, None
    return loss


def _numbers(values: Any) -> Any:
    waits = lambda x: isinstance(x, LazyLoss)  # noqa: E731
    return pytree.tree_map(lambda x: x.number() if waits(x) else x, values, is_leaf=waits)


def _flatten(x: LazyLoss) -> tuple[list[Any], Any]:
    return ([x.rows.h], (x.rows, x.judged)) if x.made is None else ([x.made], None)


def _unflatten(parts: Any, context: Any) -> Any:
    (part,) = parts
    if context is None or not isinstance(part, Tensor):
        return part
    rows, judged = context
    return lazy_loss(rows.but(h=part), *judged)


pytree.register_pytree_node(LazyLoss, _flatten, _unflatten, serialized_type_name="unlearn_kernels.LazyLoss")

"""Losses that wait until somebody looks: models compute one from labels whether or not it is used."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from unlearn_kernels.token_loss.lazy.changes import version
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
_BETWEEN = ("torch.", "unlearn_kernels.")


@dataclass(frozen=True, eq=False)
class Asked:
    """What a loss is of, as it was when somebody asked for it."""

    rows: Rows
    labels: Tensor
    ignore_index: int
    reduction: str
    seen: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seen", version(self.labels))

    def number(self) -> Tensor:
        """The loss.

        Raises:
            RuntimeError: if anything of it has been written to since.
        """
        if version(self.labels) != self.seen:
            raise RuntimeError(
                "a loss of lazy logits is computed when it is first used, and the labels changed in place since "
                "it was asked for: use it before"
            )
        return nll(self.rows.unchanged(), self.labels, self.ignore_index, self.reduction)


class LazyLoss(Tensor):
    """A sum or mean of likelihoods, computed with its gradients when it is first used, and never if it is not.

    Attributes:
        asked: logits, labels, ignored label and reduction.
        differentiable: whether gradients were enabled when it was asked for.
        made: the number, once it was used.
    """

    asked: Asked
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
            rows, handle = watched(args[0].asked.rows.unchanged(), args[-1])
            args[0].asked = replace(args[0].asked, rows=rows)
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
                self.made = self.asked.number()
        return self.made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return repr(self.number())


class _Link(torch.autograd.Function):
    """Ties a lazy loss to the history of its parts."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], asked: Asked, *_: Tensor | None) -> Tensor:
        ctx.asked = asked
        return make()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, needed = ctx.asked.rows, ctx.needs_input_grad[2:]
        wanted = [x for x, need in zip((rows.h, rows.W, rows.bias), needed, strict=True) if need]
        with torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.asked.number(), wanted, grad))
        return None, None, *[next(found) if need else None for need in needed]


def lazy_loss(rows: Rows, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """`nll` of these, when it is needed."""
    wide = torch.promote_types(torch.promote_types(rows.h.dtype, rows.dtype), torch.float32)

    def make() -> Tensor:
        return Tensor._make_wrapper_subclass(LazyLoss, (), dtype=wide, device=rows.h.device)

    parts, asked = (rows.h, rows.W, rows.bias), Asked(rows, labels, ignore_index, reduction)
    grad = torch.is_grad_enabled()
    linked = grad and any(x is not None and x.requires_grad for x in parts)
    loss: Any = _Link.apply(make, asked, *parts) if linked else make()
    loss.asked, loss.differentiable, loss.made = asked, grad, None
    return loss


def asked_by_a_model() -> bool:
    """Whether code of transformers asks, whose models compute a loss for nobody wherever a batch has labels."""
    frame = sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_BETWEEN):
        frame = frame.f_back
    return str(frame.f_globals.get("__name__")).startswith("transformers.")


def _numbers(values: Any) -> Any:
    waits = lambda x: isinstance(x, LazyLoss)  # noqa: E731
    return pytree.tree_map(lambda x: x.number() if waits(x) else x, values, is_leaf=waits)


def _flatten(x: LazyLoss) -> tuple[list[Any], Any]:
    return ([x.asked.rows.h], x.asked) if x.made is None else ([x.made], None)


def _unflatten(parts: Any, asked: Any) -> Any:
    (part,) = parts
    if asked is None or not isinstance(part, Tensor):
        return part
    rows = asked.rows.unchanged().but(h=part)
    return lazy_loss(rows, asked.labels, asked.ignore_index, asked.reduction)


pytree.register_pytree_node(LazyLoss, _flatten, _unflatten, serialized_type_name="unlearn_kernels.LazyLoss")

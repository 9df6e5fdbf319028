"""What others hang on a model's output, moved to the hidden states and head that a lazy tensor stands for."""

from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels.token_loss.lazy.rows import Rows

_TRUSTED: Final = ("torch.distributed.", "deepspeed.")


class Handles:
    """One handle for the hooks of several tensors."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Takes them away."""
        for handle in self._handles:
            handle.remove()


class _Through(torch.autograd.Function):
    """The identity, whose backward runs that of another identity."""

    @staticmethod
    def forward(ctx: Any, node: Any, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.node = node
        ctx.set_materialize_grads(False)
        return tuple(x.detach() for x in parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.node.apply(*(g for g in grads if g is not None))
        return None, *grads


def watches(hook: Any) -> bool:
    """Whether a hook is FSDP's or DeepSpeed's, which waits for a backward to begin and scales a gradient at most."""
    return str(getattr(hook, "__module__", "")).startswith(_TRUSTED)


def watched(rows: Rows, hook: Any) -> tuple[Rows, Handles]:
    """The rows with a hook on each part that takes a gradient, and what removes it."""
    names = _differentiable(rows)
    views = {name: getattr(rows, name).view_as(getattr(rows, name)) for name in names}
    return rows.but(**views), Handles([x.register_hook(hook) for x in views.values()])


def through(rows: Rows | None, node: Any) -> Rows:
    """The rows as they come out of the autograd function that made `node` of their tensor.

    Raises:
        RuntimeError: if the function is none of DeepSpeed's, which are identities of what they detach: it may do
            anything, as may whoever hooks the gradient of logits.
    """
    function = getattr(node, "_forward_cls", type(node))
    if rows is None or not function.__module__.startswith(_TRUSTED):
        raise RuntimeError(
            f"{function.__name__}.apply: lazy logits cannot go through an autograd function, nor have a module's "
            "backward hooks: give it .dense(), hook the hidden states"
        )
    names = _differentiable(rows)
    parts = _Through.apply(node, *(getattr(rows, name) for name in names))
    return rows.but(**dict(zip(names, parts, strict=True)))


def _differentiable(rows: Rows) -> list[str]:
    parts = {name: getattr(rows, name) for name in ("h", "W", "bias")}
    return [name for name, x in parts.items() if x is not None and x.requires_grad]

"""An identity in the graph that hands over the gradient that passes through it."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Receive: TypeAlias = Callable[[tuple[Tensor, ...], tuple[Tensor | None, ...]], None]


class Tap(torch.autograd.Function):
    """`Tap.apply(receive, anchor, n, *outputs, *kept)` returns the n outputs as they are.

    The backward calls `receive(kept, gradients)` and passes the gradients on. `kept` goes through
    `save_for_backward`, so that activation checkpointing recomputes it and offloading moves it, as it does
    with what autograd itself keeps. `anchor` requires grad, so that the graph exists although no parameter
    requires it.
    """

    @staticmethod
    def forward(
        ctx: Any, receive: Receive, anchor: Tensor, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[count:])
        ctx.receive, ctx.others = receive, len(tensors) - count
        ctx.set_materialize_grads(False)
        # Not views in autograd's eyes: an activation in place may follow.
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if any(g is not None for g in grads):
            ctx.receive(ctx.saved_tensors, tuple(None if g is None else g.detach() for g in grads))
        return (None, None, None, *grads, *[None] * ctx.others)

"""Heads that DeepSpeed's ZeRO-3 has partitioned, made whole for as long as a loss and its backward need them."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def whole(parameter: Tensor) -> Tensor:
    """A copy of a parameter that ZeRO-3 partitions, which is still there when backward comes; others as they are."""
    if not hasattr(parameter, "ds_id"):
        return parameter
    with _gathered(parameter):
        copy: Tensor = _Copy.apply(parameter)
    return copy


def _gathered(parameter: Tensor) -> AbstractContextManager[Any]:
    """DeepSpeed's context, unless hooks of its own have gathered the parameter."""
    if parameter.numel():
        return nullcontext()
    found: AbstractContextManager[Any] = sys.modules["deepspeed"].zero.GatheredParameters([parameter])
    return found


class _Copy(torch.autograd.Function):
    """The identity, whose backward has the parameter whole again until its gradient is accumulated."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parameter = ctx.parameter
        if not parameter.numel():
            held = _gathered(parameter)
            held.__enter__()

            def release(_: Tensor) -> None:
                handle.remove()
                held.__exit__(None, None, None)

            handle = parameter.register_post_accumulate_grad_hook(release)
        return grad

"""Gradients of `linear_nll` that are made along with it, where what multiplies them is known in advance.

A sum or mean over the tokens has one unknown factor, and a frozen head leaves `d_h`, whose rows have a factor each. NPO
and SimNPO of whole sequences have theirs once the logits of a sequence were seen. One product for the logits is
enough, and backward only scales.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels import _loader, _ops
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.token_loss import preference
from unlearn_kernels.token_loss._autograd import fake_gradients, one_by_one, refuse

SWEEP: Final = _ops.raw("linear_nll_sweep")

Swept = tuple[Tensor, Tensor, Tensor, Tensor]


class NllAndGradients(torch.autograd.Function):
    """(weights, h, weight, bias, labels, ignore_index, scale, softcap, need_weight, bounds, beta) -> (result, *found).

    With `need_weight` the result is sum(weights * nll), or with bounds `preference` of it; otherwise nll, of a head
    that takes no gradient.
    """

    @staticmethod
    def forward(*args: Any) -> Swept:
        nll, *gradients = SWEEP(*args)
        weights, (need_weight, bounds, beta) = args[0], args[8:]
        if bounds is not None:
            return preference(weights, nll, bounds, beta), *gradients
        return (weights * nll).sum() if need_weight else nll, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Swept) -> None:
        ctx.ignore_index, ctx.need_weight = inputs[5], inputs[8]
        ctx.mark_non_differentiable(*output[1:])
        # Or backward would be handed zeros of the size of the head for the gradient of `d_weight`.
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *inputs[1:5])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_h, d_weight, d_bias, *inputs, labels = ctx.saved_tensors
        if grad is None:
            return (None,) * 11
        scaled = scaled_eagerly if torch.compiler.is_compiling() else Scaled.apply
        if not ctx.need_weight:
            return None, scaled(of_rows(grad, labels, ctx.ignore_index), d_h, *inputs), *[None] * 9
        d_h, d_weight, d_bias = (scaled(grad, x, *inputs) for x in (d_h, d_weight, d_bias))
        return None, d_h, d_weight, None if inputs[2] is None else d_bias, *[None] * 7

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Swept, tuple[int, ...]]:
        return one_by_one(NllAndGradients.apply, info, in_dims, args), (0, 0, 0, 0)


class Scaled(torch.autograd.Function):
    """`factor * gradient` in the gradient's dtype; refuses derivatives to what the gradient was made from."""

    @staticmethod
    def forward(factor: Tensor, gradient: Tensor, *made_from: Tensor | None) -> Tensor:
        if _graph_is_kept():
            return scaled_eagerly(factor, gradient)
        on_cpu = factor.device.type == "cpu"  # elsewhere, to ask for the number would be to wait for it
        if on_cpu and factor.numel() == 1 and factor.item() == 1:
            return gradient
        return gradient.mul_(factor)  # a head's gradient is large, and nobody will ask for it again

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return one_by_one(Scaled.apply, info, in_dims, args), 0


def scaled_eagerly(factor: Tensor, gradient: Tensor, *_: Tensor | None) -> Tensor:
    """The same out of place, for tracing."""
    return (factor * gradient).to(gradient.dtype)


def of_rows(grad: Tensor, labels: Tensor | None, ignore_index: int) -> Tensor:
    """What multiplies each row's gradient, (*, 1): 0 where the label is ignored, even of a mean over none."""
    kept = grad if labels is None else torch.where(labels != ignore_index, grad, 0.0)
    return kept.unsqueeze(-1)


def _graph_is_kept() -> bool:
    """Whether backward may come again, so that what it holds must stay as it is."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or torch._C._current_graph_task_id() == -1 or ask()


def weighted_total(weights: Tensor, h: Tensor, *args: Any) -> Tensor:
    """sum(weights * nll), its gradients in hand."""
    return NllAndGradients.apply(weights, h, *args, True, None, 1.0)[0]


def sequence_preference(weights: Tensor, bounds: Tensor, beta: float, h: Tensor, *args: Any) -> Tensor:
    """`reference.preference` of whole sequences, its gradients in hand."""
    return NllAndGradients.apply(weights, h, *args, True, bounds, beta)[0]


def frozen_nll(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *settings: Any) -> Tensor:
    """nll of a head that takes no gradient, d_h in hand."""
    ones = torch.ones(labels.shape, dtype=accumulation_dtype(h), device=h.device)
    return NllAndGradients.apply(ones, h, weight, bias, labels, *settings, False, None, 1.0)[0]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward to one of them may follow."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def in_accumulation_type(tensors: Sequence[Tensor | None]) -> bool:
    """Whether gradients of some rows may be added to those of others in the tensors' own dtype."""
    return all(x is None or x.dtype == accumulation_dtype(x) for x in tensors)


def _fake(
    weights: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    need_weight: bool,
    bounds: Tensor | None = None,
    beta: float = 1.0,
) -> Swept:
    nll = h.new_empty(labels.shape, dtype=accumulation_dtype(h))
    gradients = fake_gradients(h, weight, bias, True, need_weight, bias is not None and need_weight)
    return nll, *gradients


def _triton(*args: Any) -> Swept:
    from unlearn_kernels.triton_kernels import token_loss as kernels

    return kernels.linear_nll_sweep(*args)


if _loader.have_C:
    _ops.register_raw("linear_nll_sweep", _fake, _triton)

"""How `linear_nll` is differentiated, batched and traced: two functions over two raw operators.

The raw operators carry fakes, formulas and batching rules of their own, for `torch.ops` users and export.
`LinearNll` is what the public functions apply, because `torch.func` cannot see through registered formulas.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels import _loader, _ops
from unlearn_kernels.reference.dtypes import accumulation_dtype

Forward = tuple[Tensor, Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor]
Dims = tuple[int | None, ...]

FORWARD: Final = _ops.raw("linear_nll_forward")
BACKWARD: Final = _ops.raw("linear_nll_backward")


class LinearNll(torch.autograd.Function):
    """(h, weight, bias, labels, ignore_index, scale, softcap, room) -> (nll, lse, kept logits)."""

    @staticmethod
    def forward(*args: Any) -> Forward:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(BACKWARD if torch.compiler.is_compiling() else LinearNllBackward.apply, ctx, grad)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Forward, Dims]:
        return _batched_forward(LinearNll.apply, info, in_dims, args)


class LinearNllBackward(torch.autograd.Function):
    """The gradients of `LinearNll`; not differentiable again."""

    @staticmethod
    def forward(*args: Any) -> Backward:
        return BACKWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Backward) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        refuse(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: Dims, *args: Any) -> tuple[Backward, tuple[int, ...]]:
        return _batched_backward(LinearNllBackward.apply, info, in_dims, args)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    h, weight, bias, labels, *ctx.settings, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the kept logits would double them
    ctx.save_for_backward(h, weight, bias, labels, *output[1:])


def _gradients(call: Callable[..., Backward], ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
    if grad is None:
        return (None,) * 8
    d_h, d_weight, d_bias = call(grad, *ctx.saved_tensors, *ctx.settings, need_h, need_weight)
    return (
        d_h if need_h else None,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
        *[None] * 5,
    )


def refuse(*_: Any) -> None:
    """Second derivatives would be missing terms."""
    raise RuntimeError(
        "linear_nll: gradients of gradients are not implemented; use backend='reference' for them"
    )


def _batched_forward(
    call: Callable[..., Forward], info: Any, in_dims: Dims, args: tuple[Any, ...]
) -> tuple[Forward, Dims]:
    """One call for the whole batch when the head is shared, otherwise a call for each; nothing is kept of either."""
    h, weight, bias, labels, *settings, _ = args
    if in_dims[1] is None and in_dims[2] is None:
        h, labels = (_in_front(x, dim, info) for x, dim in ((h, in_dims[0]), (labels, in_dims[3])))
        return call(h, weight, bias, labels, *settings, 0), (0, 0, None)
    nll, lse, kept = one_by_one(call, info, in_dims, (h, weight, bias, labels, *settings, 0))
    return (nll, lse, kept[0] if len(kept) else nll.new_empty(0)), (0, 0, None)


def _batched_backward(
    call: Callable[..., Backward], info: Any, in_dims: Dims, args: tuple[Any, ...]
) -> tuple[Backward, tuple[int, ...]]:
    """One call when only the hidden states want a gradient; a head has one for each of the batch."""
    grad, h, weight, bias, labels, lse, kept, *settings, need_h, need_weight = args
    if in_dims[2] is None and bias is None and need_h and not need_weight and in_dims[6] is None:
        dims = ((grad, in_dims[0]), (h, in_dims[1]), (labels, in_dims[4]), (lse, in_dims[5]))
        grad, h, labels, lse = (_in_front(x, dim, info) for x, dim in dims)
        kept = kept.new_empty(0)  # of one call's rows, if of any
        d_h, d_weight, d_bias = call(grad, h, weight, bias, labels, lse, kept, *settings, True, False)
        d_weight, d_bias = (x.expand(info.batch_size, *x.shape) for x in (d_weight, d_bias))
        return (d_h, d_weight, d_bias), (0, 0, 0)
    return one_by_one(call, info, in_dims, args), (0, 0, 0)


def _in_front(x: Tensor, dim: int | None, info: Any) -> Tensor:
    """`x` with its batch dimension first; a shared tensor is expanded, which copies nothing."""
    return x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)


def one_by_one(call: Callable[..., Any], info: Any, in_dims: Dims, args: tuple[Any, ...]) -> Any:
    """A call for each of the batch, stacked."""

    def item(index: int) -> list[Any]:
        return [x if dim is None else x.select(dim, index) for x, dim in zip(args, in_dims, strict=True)]

    results = [call(*item(index)) for index in range(info.batch_size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


def _fake_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    room: int,
) -> Forward:
    nll = h.new_empty(labels.shape, dtype=accumulation_dtype(h))
    return nll, torch.empty_like(nll), nll.new_empty(room)


def _fake_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    kept: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    need_h: bool,
    need_weight: bool,
) -> Backward:
    return fake_gradients(h, weight, bias, need_h, need_weight, bias is not None)


def fake_gradients(
    h: Tensor, weight: Tensor, bias: Tensor | None, need_h: bool, need_weight: bool, need_bias: bool
) -> Backward:
    """Gradients to hidden states and a head; empty where not needed."""
    d_h = h.new_empty(h.shape if need_h else (0,))
    d_weight = weight.new_empty((weight.shape[0] if need_weight else 0, weight.shape[1]))
    return d_h, d_weight, (weight if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0)


def _triton_forward(*args: Any) -> Forward:
    from unlearn_kernels.triton_kernels import token_loss as kernels

    return kernels.linear_nll_forward(*args)


def _triton_backward(*args: Any) -> Backward:
    from unlearn_kernels.triton_kernels import token_loss as kernels

    return kernels.linear_nll_backward(*args)


def _register() -> None:
    forward, backward = (f"{_ops.NAMESPACE}::linear_nll_{way}" for way in ("forward", "backward"))
    _ops.register_raw("linear_nll_forward", _fake_forward, _triton_forward)
    _ops.register_raw("linear_nll_backward", _fake_backward, _triton_backward)
    torch.library.register_autograd(
        forward, lambda ctx, grad, *_: _gradients(BACKWARD, ctx, grad), setup_context=_setup_raw
    )
    torch.library.register_autograd(backward, refuse)
    torch.library.register_vmap(
        forward, lambda info, dims, *args: _batched_forward(FORWARD, info, dims, args)
    )
    torch.library.register_vmap(
        backward, lambda info, dims, *args: _batched_backward(BACKWARD, info, dims, args)
    )


def _setup_raw(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    _save(ctx, inputs, output)


if _loader.have_C:
    _register()

"""How statistics of a head's rows are differentiated, traced and registered: one function over three raw operators.

The raw operators return fields (F, *) a row (`reference.token_rows.FIELDS`), whose gradients are linear in what comes
back to each. Public operators are fields, or a few lines of autograd on top of them.
"""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _loader, _ops
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.token_rows import FIELDS, STATS
from unlearn_kernels.token_loss._autograd import fake_gradients, one_by_one, refuse
from unlearn_kernels.token_loss._sweep import (
    Scaled,
    in_accumulation_type,
    of_rows,
    scaled_eagerly,
    wants_gradient,
)

Forward = tuple[Tensor, Tensor]
Backward = tuple[Tensor, Tensor, Tensor]
# Fields of a kind and what multiplies them.
Terms = tuple[tuple[int, float], ...]

FORWARD: Final = _ops.raw("linear_rows_forward")
BACKWARD: Final = _ops.raw("linear_rows_backward")
SWEEP: Final = _ops.raw("linear_rows_sweep")


class RowArguments(NamedTuple):
    """The arguments of the raw operators: a head, that of a reference, labels (None: every row counts), settings."""

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_h: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None
    labels: Tensor | None
    ignore_index: int
    scale: float
    softcap: float
    kind: int
    beta: float = 0.0
    offset: float = 0.0

    def wants_gradient(self) -> bool:
        """Whether a backward to the hidden states or the head may follow."""
        return wants_gradient(self.h, self.weight, self.bias)

    def shares(self, mean: bool) -> Tensor:
        """What each row counts in a sum or mean over those that count."""
        dtype = accumulation_dtype(self.h)
        if self.labels is None:
            kept = torch.ones(self.h.shape[:-1], dtype=dtype, device=self.h.device)
        else:
            kept = (self.labels != self.ignore_index).to(dtype)
        return kept / kept.sum() if mean else kept


class LinearRows(torch.autograd.Function):
    """(*RowArguments) -> (fields, argmax)."""

    @staticmethod
    def forward(*args: Any) -> Forward:
        return FORWARD(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[:7])
        ctx.settings = inputs[7:]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(
            BACKWARD if torch.compiler.is_compiling() else LinearRowsBackward.apply, ctx, upstream
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Forward, tuple[int, ...]]:
        return one_by_one(LinearRows.apply, info, in_dims, args), (0, 0)


class LinearRowsBackward(torch.autograd.Function):
    """The gradients of `LinearRows`; not differentiable again."""

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
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Backward, tuple[int, ...]]:
        return one_by_one(LinearRowsBackward.apply, info, in_dims, args), (0, 0, 0)


def _gradients(call: Callable[..., Backward], ctx: Any, upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(RowArguments._fields)
    need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
    need_head = need_weight or need_bias
    d_h, d_weight, d_bias = call(upstream, *ctx.saved_tensors, *ctx.settings, need_h, need_head)
    found = d_h if need_h else None, d_weight if need_weight else None, d_bias if need_bias else None
    return *found, *[None] * (len(RowArguments._fields) - 3)


class CombinationAndGradients(torch.autograd.Function):
    """(weights, terms, need_weight, *RowArguments) -> (result, d_h, d_weight, d_bias).

    Terms are (field, coefficient). With `need_weight` the result is sum(weights * terms), otherwise the terms, of a
    head that takes no gradient.
    """

    @staticmethod
    def forward(weights: Tensor, terms: Terms, need_weight: bool, *args: Any) -> tuple[Tensor, ...]:
        upstream = weights.new_zeros(len(FIELDS[RowArguments(*args).kind]), *weights.shape)
        for field, coefficient in terms:
            upstream[field] = coefficient * weights
        fields, _, *gradients = SWEEP(upstream, *args, need_weight)
        value = combined(fields, terms)
        return (weights * value).sum() if need_weight else value, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.need_weight, ctx.has_bias, ctx.ignore_index = inputs[2], inputs[5] is not None, inputs[10]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:], *inputs[3:6], inputs[9])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        d_h, d_weight, d_bias, *inputs, labels = ctx.saved_tensors
        rest = [None] * (len(RowArguments._fields) - 3)
        if grad is None:
            return (None,) * 6 + tuple(rest)
        scaled = scaled_eagerly if torch.compiler.is_compiling() else Scaled.apply
        if not ctx.need_weight:
            factor = of_rows(grad, labels, ctx.ignore_index)
            return None, None, None, scaled(factor, d_h, *inputs), None, None, *rest
        d_h, d_weight, d_bias = (scaled(grad, x, *inputs) for x in (d_h, d_weight, d_bias))
        return None, None, None, d_h, d_weight, d_bias if ctx.has_bias else None, *rest

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, tuple[int, ...]]:
        return one_by_one(CombinationAndGradients.apply, info, in_dims, args), (0, 0, 0, 0)


def combined(fields: Tensor, terms: Terms) -> Tensor:
    """The sum of terms, (*)."""
    (first, coefficient), *others = terms
    value = coefficient * fields[first]
    for field, other in others:
        value = value + other * fields[field]
    return value


def combination(args: RowArguments, terms: Terms, reduction: str) -> Tensor:
    """A sum of fields, reduced; gradients are made along with it where one factor a row, or one in all, is unknown."""
    trained = wants_gradient(args.weight, args.bias)
    if wants_gradient(args.h) and not trained:
        ones = torch.ones(args.h.shape[:-1], dtype=accumulation_dtype(args.h), device=args.h.device)
        value: Tensor = CombinationAndGradients.apply(ones, terms, False, *args)[0]
        return reduced(value, args, reduction)
    if reduction != "none" and wants_gradient(args.h) and in_accumulation_type((args.weight, args.bias)):
        total: Tensor = CombinationAndGradients.apply(args.shares(reduction == "mean"), terms, True, *args)[0]
        return total
    return reduced(combined(LinearRows.apply(*args)[0], terms), args, reduction)


def reduced(value: Tensor, args: RowArguments, reduction: str) -> Tensor:
    """A field over the rows that count."""
    if reduction == "none":
        return value
    return value.sum() if reduction == "sum" else (value * args.shares(True)).sum()


def _fake_forward(*args: Any) -> Forward:
    x = RowArguments(*args)
    fields = x.h.new_empty((len(FIELDS[x.kind]), *x.h.shape[:-1]), dtype=accumulation_dtype(x.h))
    shape = x.h.shape[:-1] if x.kind == STATS else (0,)
    return fields, x.h.new_empty(shape, dtype=torch.long)


def _fake_backward(upstream: Tensor, fields: Tensor, argmax: Tensor, *args: Any) -> Backward:
    *inputs, need_h, need_weight = args
    x = RowArguments(*inputs)
    return fake_gradients(x.h, x.weight, x.bias, need_h, need_weight, need_weight and x.bias is not None)


def _fake_sweep(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    *inputs, need_weight = args
    x = RowArguments(*inputs)
    need_bias = need_weight and x.bias is not None
    return *_fake_forward(*inputs), *fake_gradients(x.h, x.weight, x.bias, True, need_weight, need_bias)


def _triton(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        from unlearn_kernels.triton_kernels import token_rows as kernels

        return getattr(kernels, name)(*args)

    return launch


def _register() -> None:
    fakes: dict[str, Callable[..., Any]] = {
        "forward": _fake_forward,
        "backward": _fake_backward,
        "sweep": _fake_sweep,
    }
    for way, fake in fakes.items():
        _ops.register_raw(f"linear_rows_{way}", fake, _triton(f"linear_rows_{way}"))
    forward, backward = (f"{_ops.NAMESPACE}::linear_rows_{way}" for way in ("forward", "backward"))

    def raw_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(BACKWARD, ctx, upstream)

    torch.library.register_autograd(forward, raw_gradients, setup_context=_setup_raw)
    torch.library.register_autograd(backward, refuse)


def _setup_raw(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    LinearRows.setup_context(ctx, inputs, output)


if _loader.have_C:
    _register()

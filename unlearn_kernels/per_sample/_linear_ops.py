"""Registers the operators of the linear layer: fakes, and the Triton launchers, imported when they are called."""

from typing import Any

from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import linear as reference


def _fake_dots(
    a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor, summed: bool, bias: bool, method: int
) -> Tensor:
    shape = a1.shape[:1] if summed else (a1.shape[0], a2.shape[0])
    return a1.new_empty(shape, dtype=accumulation_dtype(a1))


def _fake_weighted_sum(a: Tensor, g: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    outputs = g.shape[2]
    return g.new_empty(outputs, a.shape[2]), g.new_empty(outputs if bias else 0)


def _fake_grads(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    batch, outputs, dtype = g.shape[0], g.shape[2], accumulation_dtype(a)
    weight = g.new_empty(batch, outputs, a.shape[2], dtype=dtype)
    return weight, g.new_empty(batch if bias else 0, outputs, dtype=dtype)


def _fake_two_sided(a: Tensor, g: Tensor, left: Tensor, right: Tensor, bias: bool) -> Tensor:
    width = left.shape[0] * (right.shape[0] + bias)
    return a.new_empty(a.shape[0], width, dtype=accumulation_dtype(a))


def _fake_sketch(a: Tensor, g: Tensor, bias: bool, k: int, seed: int) -> Tensor:
    return a.new_empty(a.shape[0], k, dtype=accumulation_dtype(a))


def _triton_dots(*arguments: Any) -> Any:
    from unlearn_kernels.triton_kernels.per_sample import linear_dots as kernels

    return kernels.linear_dots(*arguments)


def _triton_weighted_sum(*arguments: Any) -> Any:
    from unlearn_kernels.triton_kernels.per_sample import linear_sums as kernels

    return kernels.linear_weighted_sum(*arguments)


def _triton_grads(*arguments: Any) -> Any:
    from unlearn_kernels.triton_kernels.per_sample import linear_sums as kernels

    return kernels.linear_grads(*arguments)


def _triton_two_sided(*arguments: Any) -> Any:
    from unlearn_kernels.triton_kernels.per_sample import linear_project as kernels

    return kernels.linear_two_sided(*arguments)


def _triton_sketch(*arguments: Any) -> Any:
    from unlearn_kernels.triton_kernels.per_sample import linear_project as kernels

    return kernels.linear_sketch(*arguments)


_ops.register_operator(
    "linear_dots",
    "per_sample",
    "<sum_t g_t a_t^T, sum_s g'_s a'_s^T>",
    reference=reference.linear_dots,
    fake=_fake_dots,
    triton=_triton_dots,
)
_ops.register_operator(
    "linear_weighted_sum",
    "per_sample",
    "sum_i w_i sum_t g_it a_it^T",
    reference=reference.linear_weighted_sum,
    fake=_fake_weighted_sum,
    triton=_triton_weighted_sum,
)
_ops.register_operator(
    "linear_grads",
    "per_sample",
    "sum_t g_t a_t^T",
    reference=reference.linear_grads,
    fake=_fake_grads,
    triton=_triton_grads,
)
_ops.register_operator(
    "linear_two_sided",
    "per_sample",
    "sum_t L g_t (R a_t)^T",
    reference=reference.linear_two_sided,
    fake=_fake_two_sided,
    triton=_triton_two_sided,
)
_ops.register_operator(
    "linear_sketch",
    "per_sample",
    "vec(sum_t g_t a_t^T) P^T / sqrt(k), P = +-1",
    reference=reference.linear_sketch,
    fake=_fake_sketch,
    triton=_triton_sketch,
)

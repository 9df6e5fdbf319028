"""The raw operators of convolutions: maps (B, C, D, H, W), and a window of 12 numbers."""

from collections.abc import Sequence

from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import conv as reference


def _fake_sqnorms(
    a: Tensor, g: Tensor, window: Sequence[int], groups: int, bias: bool, method: int
) -> Tensor:
    return a.new_empty(a.shape[0], dtype=accumulation_dtype(a, g))


def _fake_dots(
    a1: Tensor,
    g1: Tensor,
    a2: Tensor,
    g2: Tensor,
    window: Sequence[int],
    groups: int,
    bias: bool,
    summed: bool,
) -> Tensor:
    shape = a1.shape[:1] if summed else (a1.shape[0], a2.shape[0])
    return a1.new_empty(shape, dtype=accumulation_dtype(a1, g1))


def _fake_grads(
    a: Tensor, g: Tensor, w: Tensor | None, window: Sequence[int], groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    batch, dtype = a.shape[:1] if w is None else (), accumulation_dtype(a, g)
    weight = a.new_empty((*batch, g.shape[1], a.shape[1] // groups, *window[:3]), dtype=dtype)
    return weight, a.new_empty((*batch, g.shape[1] if bias else 0), dtype=dtype)


def _triton_sqnorms(
    a: Tensor, g: Tensor, window: Sequence[int], groups: int, bias: bool, method: int
) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import conv as kernels

    return kernels.conv_sqnorms(a, g, window, groups, bias, method)


def _triton_dots(
    a1: Tensor,
    g1: Tensor,
    a2: Tensor,
    g2: Tensor,
    window: Sequence[int],
    groups: int,
    bias: bool,
    summed: bool,
) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import conv as kernels

    return kernels.conv_dots(a1, g1, a2, g2, window, groups, bias, summed)


def _triton_grads(
    a: Tensor, g: Tensor, w: Tensor | None, window: Sequence[int], groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    from unlearn_kernels.triton_kernels.per_sample import conv as kernels

    return kernels.conv_grads(a, g, w, window, groups, bias)


_ops.register_operator(
    "conv_sqnorms",
    "per_sample",
    "|sum_t g_t u_t^T|^2 (+ |sum_t g_t|^2), u = unfold(a)",
    reference=reference.conv_sqnorms,
    fake=_fake_sqnorms,
    triton=_triton_sqnorms,
)
_ops.register_operator(
    "conv_dots",
    "per_sample",
    "<W_i, W'_j> or <W_i, sum_j W'_j>, W = sum_t g_t u_t^T",
    reference=reference.conv_dots,
    fake=_fake_dots,
    triton=_triton_dots,
)
_ops.register_operator(
    "conv_grads",
    "per_sample",
    "W_i or sum_i w_i W_i, W = sum_t g_t u_t^T",
    reference=reference.conv_grads,
    fake=_fake_grads,
    triton=_triton_grads,
)

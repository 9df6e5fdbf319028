"""The raw operators of the head's per-sample gradients, and the checks of what goes into them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import REGISTRY, Backend, select
from unlearn_kernels._checks import check_range
from unlearn_kernels.per_sample._checks import folded
from unlearn_kernels.reference import token_loss as token_reference
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import lm_head as reference
from unlearn_kernels.token_loss._autograd import FORWARD


class Tokens(NamedTuple):
    """The tokens of some samples at a language-model head.

    Attributes:
        h: hidden states, (B, ..., d); any strides; float32, float64, bfloat16 or float16.
        labels: (B, ...), integers in [0, V) or `ignore_index`.
        upstream: the gradient of the loss to each token's negative log-likelihood, (B, ...); ones if None.
        lse: log-sum-exps of the logits, (B, ...); computed if None, at the price of the logits.
    """

    h: Tensor
    labels: Tensor
    upstream: Tensor | None = None
    lse: Tensor | None = None


def _fake_sqnorms(h: Tensor, *_: Any) -> Tensor:
    return h.new_empty(h.shape[0], dtype=accumulation_dtype(h))


def _fake_dots(
    h1: Tensor,
    labels1: Tensor,
    upstream1: Tensor | None,
    lse1: Tensor | None,
    h2: Tensor,
    labels2: Tensor,
    upstream2: Tensor | None,
    lse2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    summed: bool,
    method: int,
) -> Tensor:
    shape = h1.shape[:1] if summed else (h1.shape[0], h2.shape[0])
    return h1.new_empty(shape, dtype=accumulation_dtype(h1))


def _fake_tied_dots(ids: Tensor, g: Tensor, *_: Any) -> Tensor:
    return g.new_empty(ids.shape[0], dtype=accumulation_dtype(g))


def _triton_sqnorms(*args: Any) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import lm_head as kernels

    return kernels.lm_head_sqnorms(*args)


def _triton_dots(*args: Any) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import lm_head as kernels

    return kernels.lm_head_dots(*args)


def _triton_tied_dots(*args: Any) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import lm_head as kernels

    return kernels.lm_head_tied_dots(*args)


_ops.register_operator(
    "lm_head_sqnorms",
    "per_sample",
    "|sum_t u_t (softmax(W h_t + b) - e_y) h_t^T|^2",
    reference=reference.lm_head_sqnorms,
    fake=_fake_sqnorms,
    triton=_triton_sqnorms,
)
_ops.register_operator(
    "lm_head_dots",
    "per_sample",
    "sum_ts (h_t . h'_s) (q_t . q'_s), q = u (softmax(W h + b) - e_y)",
    reference=reference.lm_head_dots,
    fake=_fake_dots,
    triton=_triton_dots,
)
_ops.register_operator(
    "lm_head_tied_dots",
    "per_sample",
    "sum_ts q_s[id_t] (g_t . h_s), q = u (softmax(W h + b) - e_y)",
    reference=reference.lm_head_tied_dots,
    fake=_fake_tied_dots,
    triton=_triton_tied_dots,
)


def checked(tokens: Tokens, W: Tensor, bias: Tensor | None, ignore_index: int, suffix: str = "") -> Tokens:
    """The tokens with all dimensions between the first and the last folded into one, in the types of the kernels.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or, on the CPU, a label is out of range; `suffix`
            tells the names of two sides apart.
    """
    check_head(W, bias)
    h, labels = tokens.h.detach(), tokens.labels
    if h.dim() < 2 or h.shape[-1] != W.shape[1]:
        raise ValueError(f"h{suffix} must have shape (B, ..., {W.shape[1]}) to fit W, got {tuple(h.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels{suffix} must be integers, got {labels.dtype}")
    check_float(f"h{suffix}", h, W)
    for name, x in zip(Tokens._fields[1:], tokens[1:], strict=True):
        if x is not None and x.shape != h.shape[:-1]:
            wanted, got = tuple(h.shape[:-1]), tuple(x.shape)
            raise ValueError(f"{name}{suffix} must have shape {wanted} to fit h{suffix}, got {got}")
        if x is not None and x.device != W.device:
            raise ValueError(f"{name}{suffix} must be on the device of W, {W.device}, got {x.device}")
    if labels.is_cpu:
        check_range(f"labels{suffix}", labels, W.shape[0], ignore_index)
    wide = accumulation_dtype(h)
    rest = (None if x is None else flat(x.detach().to(wide)) for x in tokens[2:])
    return Tokens(folded(h), flat(labels.long()), *rest)


def logsumexps(
    x: Tokens, W: Tensor, bias: Tensor | None, ignore_index: int, backend: Backend | None
) -> Tensor:
    """Those of checked tokens: what was given, or those that the forward of `linear_nll` leaves."""
    if x.lse is not None:
        return x.lse
    tensors = (x.h, W) if bias is None else (x.h, W, bias)
    forward = token_reference.linear_nll_forward if plain_nll(backend, tensors) else FORWARD
    found: Tensor = forward(x.h, W.detach(), detached(bias), x.labels, ignore_index, 1.0, 0.0, 0)[1]
    return found


def plain_nll(backend: Backend | None, tensors: tuple[Tensor, ...]) -> bool:
    """Whether `linear_nll` would run in plain PyTorch."""
    return select("linear_nll", backend, tensors) is REGISTRY["linear_nll"].impls["reference"].call


def detached(x: Tensor | None) -> Tensor | None:
    """`x` without its history."""
    return None if x is None else x.detach()


def check_head(W: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError unless `W` is a matrix and `bias` fits it."""
    if W.dim() != 2 or not W.is_floating_point():
        raise ValueError(f"W must be a floating-point tensor (V, d), got {W.dtype} {tuple(W.shape)}")
    if bias is not None:
        check_float("bias", bias, W)
        if bias.shape != W.shape[:1]:
            raise ValueError(f"bias must have shape ({W.shape[0]},), got {tuple(bias.shape)}")


def check_float(name: str, x: Tensor, W: Tensor) -> None:
    """Raises ValueError unless `x` can be multiplied with `W`."""
    if not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if (x.dtype == torch.float64) != (W.dtype == torch.float64):
        raise ValueError(f"{name} and W must both be float64 or neither, got {x.dtype} and {W.dtype}")
    if x.device != W.device:
        raise ValueError(f"{name} must be on the device of W, {W.device}, got {x.device}")


def flat(x: Tensor) -> Tensor:
    """`x` as (B, T), with every dimension from the second on folded into T."""
    return x if x.dim() == 2 else folded(x.unsqueeze(-1)).squeeze(-1)

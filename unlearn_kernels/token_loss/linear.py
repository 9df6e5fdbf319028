r"""Negative log-likelihoods of a linear head: `nll_t = logsumexp_v z_tv - z_{t, y_t}`, `z = h W^T + b`."""

from typing import Literal

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import FLOATS, Backend, Impl, Operator, register, select
from unlearn_kernels._checks import check_range
from unlearn_kernels.reference import token_loss as reference
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.token_loss import _sweep
from unlearn_kernels.token_loss._autograd import LinearNll

Reduction = Literal["none", "sum", "mean"]


def _kernels(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction = "none",
) -> Tensor:
    head = (weight, bias)
    if _sweep.wants_gradient(h) and not _sweep.wants_gradient(*head):
        return _reduced(
            _sweep.frozen_nll(h, weight, bias, labels, ignore_index), labels, ignore_index, reduction
        )
    if reduction != "none" and _sweep.wants_gradient(h) and _sweep.in_accumulation_type(head):
        shares = _shares(h, labels, ignore_index, reduction)
        return _sweep.weighted_total(shares, h, weight, bias, labels, ignore_index)
    nll = LinearNll.apply(h, weight, bias, labels, ignore_index)[0]
    return _reduced(nll, labels, ignore_index, reduction)


def _reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    reduction: Reduction = "none",
) -> Tensor:
    nll = reference.linear_nll(h, weight, bias, labels, ignore_index)
    return _reduced(nll, labels, ignore_index, reduction)


def _reduced(nll: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return nll
    return nll.sum() if reduction == "sum" else nll.sum() / (labels != ignore_index).sum()


def _shares(h: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """What each token counts in the reduction."""
    kept = (labels != ignore_index).to(accumulation_dtype(h))
    return kept if reduction == "sum" else kept / kept.sum()


register(
    Operator(
        "linear_nll",
        "token_loss",
        "logsumexp_v(h_t W_v + b_v) - (h_t W_y + b_y)",
        {
            "cpp": Impl("cpp", _kernels, ("cpu",), FLOATS, _ops.no_extension),
            "triton": Impl("triton", _kernels, ("cuda",), FLOATS, _ops.no_triton_kernels),
            "reference": Impl("reference", _reference, ("cpu", "cuda")),
        },
        differentiable=True,
    )
)


def linear_nll(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "none",
    backend: Backend | None = None,
) -> Tensor:
    r"""Negative log-likelihood of each label under a linear head, with no logits in memory.

    .. math:: n_t = \log \sum_v e^{z_{tv}} - z_{t, y_t}, \qquad z_t = W h_t + b

    Nothing is shifted: row t of `h` is judged with label t. Differentiable once, to `h`, `W` and `bias`, for
    any upstream gradient:

    .. math:: \partial n_t / \partial z_t = \mathrm{softmax}(z_t) - e_{y_t}

    Backward computes the logits again (8 N d V FLOPs in all) unless one sweep can make the gradients ahead:
    under `reduction` "sum" or "mean" with `W` and `bias` in float32 or float64 (6 N d V), and for a head that
    takes no gradient, whatever the reduction (4 N d V).

    Rows whose label is ignored are left out of every product.

    Args:
        h: hidden states, (*, d); any strides; float32, float64, bfloat16 or float16.
        W: the head, (V, d); any strides. float64 only together with float64 hidden states.
        labels: (*), integers in [0, V) or `ignore_index`.
        bias: (V,).
        ignore_index: the label of rows that do not count; they get 0, and no gradient.
        reduction: "none"; "sum"; or "mean", over the rows that count (NaN if there are none, as in PyTorch).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (*), or a scalar if reduced; float32 (float64 for float64 inputs), accumulated in that type. Gradients
        come in the dtypes of what they belong to. The same bits at every number of threads.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `reduction` is unknown, or a label is neither in
            [0, V) nor ignored (on CUDA such a row becomes NaN instead).
        RuntimeError: if a gradient is differentiated again.

    Scratch on the CPU for N rows that count, in elements of the accumulation type: `N d + N V / 96` forward;
    `3 N d` and a block of logits, 8 MB or N x 384, backward; in one sweep `3 N d` and the logits of N / 6 rows
    (8 MB or 64 rows if that is more); V with a bias; under 1 MB a thread.

    Sources: Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009); Hsu et al. 2024 (Liger Kernel,
    arXiv 2410.10989).
    """
    _check(h, W, labels, bias)
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")
    tensors = (h, W) if bias is None else (h, W, bias)
    call = select("linear_nll", backend, tensors)
    try:
        return call(h, W, bias, labels.long(), ignore_index, reduction)
    except (RuntimeError, IndexError):
        check_range("labels", labels, W.shape[0], ignore_index)
        raise


def _check(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if W.dim() != 2:
        raise ValueError(f"W must have shape (V, d), got {tuple(W.shape)}")
    if h.dim() < 1 or h.shape[-1] != W.shape[1]:
        raise ValueError(f"h must have shape (*, {W.shape[1]}) to fit W, got {tuple(h.shape)}")
    if labels.shape != h.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(h.shape[:-1])} to fit h, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if bias is not None and bias.shape != W.shape[:1]:
        raise ValueError(f"bias must have shape ({W.shape[0]},), got {tuple(bias.shape)}")
    for name, x in (("W", W), ("labels", labels), ("bias", bias)):
        if x is not None and x.device != h.device:
            raise ValueError(f"{name} must be on the device of h, {h.device}, got {x.device}")
    for name, x in (("h", h), ("W", W), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x is not None and (x.dtype == torch.float64) != (h.dtype == torch.float64):
            raise ValueError(
                f"h, W and bias must all be float64 or none, got {name} of {x.dtype} and h of {h.dtype}"
            )

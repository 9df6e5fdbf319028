"""Losses of a language-model head in plain formulas, with the logits in memory."""

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype


def logits(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`z = h W^T + b`, (*, V)."""
    dtype = accumulation_dtype(h, weight)
    z = h.to(dtype) @ weight.to(dtype).T
    return z if bias is None else z + bias.to(dtype)


def linear_nll(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Tensor:
    """`nll_t = logsumexp_v z_tv - z_ty`, 0 where the label is ignored; differentiable by autograd."""
    kept = labels != ignore_index
    # Ignored rows are left out before the product: whatever they hold, they get no gradient.
    z = logits(h[kept], weight, bias)
    nll = z.logsumexp(-1) - z.gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    return nll.new_zeros(labels.shape).masked_scatter(kept, nll)


def linear_nll_forward(
    h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """The negative log-likelihoods and the log-sum-exps, both 0 where the label is ignored."""
    kept = labels != ignore_index
    lse = logits(h[kept], weight, bias).logsumexp(-1)
    nll = linear_nll(h, weight, bias, labels, ignore_index)
    return nll, torch.zeros_like(nll).masked_scatter(kept, lse)


def linear_nll_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    ignore_index: int,
    need_h: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With `P_tv = grad_t (exp(z_tv - lse_t) - [v = y_t])`: `P W`, `P^T h`, `sum_t P_t`."""
    kept = labels != ignore_index
    rows, y, u = h[kept], labels[kept], grad[kept]
    z = logits(rows, weight, bias)
    p = (z - lse[kept].unsqueeze(-1)).exp() - torch.nn.functional.one_hot(y, weight.shape[0])
    p = p * u.unsqueeze(-1)
    d_h = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_h else h.new_empty(0)
    if need_h:
        d_h[kept] = (p @ weight.to(p.dtype)).to(h.dtype)
    d_weight = (
        (p.T @ rows.to(p.dtype)).to(weight.dtype) if need_weight else weight.new_empty(0, weight.shape[1])
    )
    d_bias = weight.new_empty(0) if bias is None else p.sum(0).to(bias.dtype)
    return d_h, d_weight, d_bias


def linear_nll_sweep(
    weights: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The negative log-likelihoods, and the gradients of their sum with these weights."""
    nll, lse = linear_nll_forward(h, weight, bias, labels, ignore_index)
    d_h, d_weight, d_bias = linear_nll_backward(
        weights, h, weight, bias, labels, lse, ignore_index, True, need_weight
    )
    return nll, d_h, d_weight, d_bias if need_weight else d_bias[:0]

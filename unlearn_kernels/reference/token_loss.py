"""Losses of a language-model head in plain formulas, with the logits in memory."""

import torch
from torch import Tensor
from torch.nn import functional

from unlearn_kernels.reference.dtypes import accumulation_dtype


def logits(
    h: Tensor, weight: Tensor, bias: Tensor | None, scale: float = 1.0, softcap: float = 0.0
) -> Tensor:
    """`z = scale (h W^T + b)`, then `softcap tanh(z / softcap)` unless softcap is 0; (*, V)."""
    dtype = accumulation_dtype(h, weight)
    z = h.to(dtype) @ weight.to(dtype).T
    z = scale * (z if bias is None else z + bias.to(dtype))
    return z if softcap == 0 else softcap * torch.tanh(z / softcap)


def linear_nll(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """`nll_t = logsumexp_v z_tv - z_ty`, 0 where the label is ignored; differentiable by autograd."""
    kept = labels != ignore_index
    # Ignored rows are left out before the product: whatever they hold, they get no gradient.
    z = logits(h[kept], weight, bias, scale, softcap)
    nll = z.logsumexp(-1) - z.gather(-1, labels[kept].unsqueeze(-1)).squeeze(-1)
    return nll.new_zeros(labels.shape).masked_scatter(kept, nll)


def linear_nll_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float = 1.0,
    softcap: float = 0.0,
    room: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The negative log-likelihoods and the log-sum-exps, both 0 where the label is ignored; keeps no logits."""
    kept = labels != ignore_index
    lse = logits(h[kept], weight, bias, scale, softcap).logsumexp(-1)
    nll = linear_nll(h, weight, bias, labels, ignore_index, scale, softcap)
    return nll, torch.zeros_like(nll).masked_scatter(kept, lse), nll.new_empty(room)


def linear_nll_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    _: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    need_h: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """With `P_tv = grad_t (exp(z_tv - lse_t) - [v = y_t]) dz_tv/d(h W^T + b)_tv`: `P W`, `P^T h`, `sum_t P_t`."""
    kept = labels != ignore_index
    rows, y, u = h[kept], labels[kept], grad[kept]
    z = logits(rows, weight, bias, scale, softcap)
    p = (z - lse[kept].unsqueeze(-1)).exp() - torch.nn.functional.one_hot(y, weight.shape[0])
    p = p * u.unsqueeze(-1) * scale
    p = p if softcap == 0 else p * (1 - (z / softcap) ** 2)
    d_h = torch.zeros_like(h, memory_format=torch.contiguous_format) if need_h else h.new_empty(0)
    if need_h:
        d_h[kept] = (p @ weight.to(p.dtype)).to(h.dtype)
    d_weight = (
        (p.T @ rows.to(p.dtype)).to(weight.dtype) if need_weight else weight.new_empty(0, weight.shape[1])
    )
    d_bias = weight.new_empty(0) if bias is None else p.sum(0).to(bias.dtype)
    return d_h, d_weight, d_bias


def preference(weights: Tensor, nll: Tensor, bounds: Tensor, beta: float) -> Tensor:
    """`-(2 / beta) mean_s log sigmoid(beta (n_s - bounds_s))`, `n_s = sum_t weights nll`: NPO's and SimNPO's."""
    return -2 / beta * functional.logsigmoid(beta * _above(weights, nll, bounds)).mean()


def preference_slopes(weights: Tensor, nll: Tensor, bounds: Tensor, beta: float) -> Tensor:
    """The gradient of `preference` to `nll`."""
    factors = torch.sigmoid(-beta * _above(weights, nll, bounds)) * (-2 / max(len(bounds), 1))
    return weights * factors.view(-1, *[1] * (nll.dim() - 1))


def _above(weights: Tensor, nll: Tensor, bounds: Tensor) -> Tensor:
    return (weights * nll).flatten(1).sum(1) - bounds if nll.dim() > 1 else weights * nll - bounds


def linear_nll_sweep(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The negative log-likelihoods, and the gradients of their sum with these weights, or of `preference` of them."""
    settings = ignore_index, scale, softcap
    nll, lse, kept = linear_nll_forward(h, weight, bias, labels, *settings)
    slopes = weights if bounds is None else preference_slopes(weights, nll, bounds, beta)
    d_h, d_weight, d_bias = linear_nll_backward(
        slopes, h, weight, bias, labels, lse, kept, *settings, True, need_weight
    )
    return nll, d_h, d_weight, d_bias if need_weight else d_bias[:0]

"""Statistics of the rows of a language-model head and distances to a reference, with the logits in memory."""

import torch
from torch import Tensor
from torch.nn import functional

from unlearn_kernels.reference.token_loss import logits

STATS, PAIR, SOFTPLUS = 0, 1, 2
# The fields of each kind, in order. Tails are what rounding took from the log-sum-exps; not differentiable, nor are
# std, margin and the reference's.
STAT_FIELDS = ("nll", "lse", "mean", "std", "margin", "peak", "average", "ceu", "lse_tail")
PAIR_FIELDS = (
    "nll",
    "lse",
    "mean",
    "kl",
    "reverse_kl",
    "soft",
    "ref_nll",
    "ref_lse",
    "ref_mean",
    "lse_tail",
    "ref_lse_tail",
)
SOFTPLUS_FIELDS = ("softplus",)
FIELDS = (STAT_FIELDS, PAIR_FIELDS, SOFTPLUS_FIELDS)


def linear_rows(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_h: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    labels: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float,
    kind: int,
    beta: float,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """The fields of a kind, (F, *), and (statistics only) the most likely words; 0 where the label is ignored.

    Differentiable by autograd to `h`, `weight` and `bias`; targets and the reference count as constants.
    """
    kept = torch.ones(h.shape[:-1], dtype=torch.bool, device=h.device)
    kept = kept if labels is None else labels != ignore_index
    y = None if labels is None else labels[kept].unsqueeze(-1)
    z = logits(h[kept], weight, bias, scale, softcap)
    r = None
    if ref_h is not None and ref_weight is not None:
        with torch.no_grad():
            r = logits(ref_h[kept], ref_weight, ref_bias, scale, softcap)
    argmax = torch.zeros(kept.shape if kind == STATS else (0,), dtype=torch.long, device=h.device)
    if kind == STATS:
        argmax[kept] = z.argmax(-1) if z.numel() else argmax[kept]
        rows = _statistics(z, y)
    elif kind == PAIR and r is not None:
        rows = _pair(z, r, y, beta)
    else:
        rows = [-functional.logsigmoid(beta * ((offset if r is None else r) - z)).sum(-1)]
    fields = [z.new_zeros(kept.shape).masked_scatter(kept, row) for row in rows]
    return torch.stack(fields), argmax


def _picked(log_p: Tensor, y: Tensor | None) -> Tensor:
    """Minus the log-probability of the label; 0 without one."""
    return log_p.new_zeros(log_p.shape[:-1]) if y is None else -log_p.gather(-1, y).squeeze(-1)


def _times(p: Tensor, x: Tensor) -> Tensor:
    """`sum p x` with 0 times infinity 0."""
    return (p * torch.where(p == 0, 0.0, x)).sum(-1)


def _statistics(z: Tensor, y: Tensor | None) -> list[Tensor]:
    log_p = z.log_softmax(-1)
    p, nll, lse = log_p.exp(), _picked(log_p, y), z.logsumexp(-1)
    mean = _times(p, log_p)
    std = _times(p.detach(), (log_p - mean.unsqueeze(-1)).detach() ** 2).sqrt()
    top = z.topk(2, dim=-1).values if z.shape[-1] > 1 else functional.pad(z, (0, 1), value=-torch.inf)
    bad = torch.where(lse.isnan(), lse, 0.0).detach()
    # One word alone leaves nothing without its label.
    ceu = torch.zeros_like(nll) if y is None or z.shape[-1] == 1 else _ceu(z, log_p, y)
    margin, peak = (top[..., 0] - top[..., 1]).detach() + bad, z.amax(-1) + bad
    return [nll, lse, mean, std, margin, peak, z.mean(-1), ceu, torch.zeros_like(lse)]


def _ceu(z: Tensor, log_p: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy to p without the label, renormalised and detached."""
    target = z.detach().scatter(-1, y, -torch.inf).softmax(-1)
    return -_times(target, log_p)


def _pair(z: Tensor, r: Tensor, y: Tensor | None, beta: float) -> list[Tensor]:
    log_p, log_q = z.log_softmax(-1), r.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    lowered = r if y is None else r.scatter_add(-1, y, torch.full_like(y, -beta, dtype=r.dtype))
    return [
        _picked(log_p, y),
        z.logsumexp(-1),
        _times(p, log_p),
        _times(q, log_q - log_p),
        _times(p, log_p - log_q),
        -_times(lowered.softmax(-1), log_p),
        _picked(log_q, y),
        r.logsumexp(-1),
        _times(q, log_q),
        *[torch.zeros_like(log_p[..., 0])] * 2,
    ]

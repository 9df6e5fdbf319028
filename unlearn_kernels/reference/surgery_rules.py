"""Rules of `project_conflict_` in plain formulas: weights of forget and retain from their inner products."""

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

AGEM, PCGRAD, GRU, BLUR, GDR_GMA, DOCO, SAGO, GRADDROP = range(8)
COMPAT, UPPER, KEEP_RETAIN, SKIP_NONFINITE = 1, 2, 4, 8


class Options(NamedTuple):
    """The numbers of the raw operator, in its order."""

    gamma: float = 1.0
    alpha: float = 0.0
    eps: float = 0.0
    lam: float = 1.0
    cosine_clip: float = torch.inf
    max_norm: float = torch.inf
    max_result_norm: float = torch.inf
    leak_forget: float = 0.0
    leak_retain: float = 0.0


class Pair(NamedTuple):
    """Inner products of forget and retain, each (S,) float64."""

    ff: Tensor
    fr: Tensor
    rr: Tensor

    @property
    def conflict(self) -> Tensor:
        """Where the gradients work against each other; a NaN counts."""
        return ~(self.fr >= 0)


Weights = tuple[Tensor, Tensor]


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return torch.where(y == 0, 0.0, x / y)


def _plain(p: Pair, f: float, r: float) -> Weights:
    return torch.full_like(p.ff, f), torch.full_like(p.ff, r)


def _where(p: Pair, conflict: Weights, plain: Weights) -> Weights:
    return torch.where(p.conflict, conflict[0], plain[0]), torch.where(p.conflict, conflict[1], plain[1])


def _agem(p: Pair, o: Options, flags: int) -> Weights:
    plain = _plain(p, o.gamma, o.alpha)
    moved = o.alpha - torch.where(p.rr == 0, 0.0, o.gamma * p.fr / (p.rr + o.eps))
    return _where(p, (plain[0], moved), plain)


def _pcgrad(p: Pair, o: Options, flags: int) -> Weights:
    both = o.gamma - o.alpha * _ratio(p.fr, p.ff), o.alpha - o.gamma * _ratio(p.fr, p.rr)
    return _where(p, both, _plain(p, o.gamma, o.alpha))


def _gru(p: Pair, o: Options, flags: int) -> Weights:
    plain, cosine = _plain(p, 1, 0), _ratio(p.fr, p.ff.sqrt() * p.rr.sqrt())
    limited = o.cosine_clip * p.ff.sqrt() / p.rr.sqrt()
    moved = torch.where(cosine < -o.cosine_clip, limited, -_ratio(p.fr, p.rr))
    return _where(p, (plain[0], moved), plain)


def _blur(p: Pair, o: Options, flags: int) -> Weights:
    kept, other = torch.full_like(p.ff, o.alpha), p.rr if flags & UPPER else p.ff
    along = torch.where(other == 0, 0.0, o.gamma - o.alpha * p.fr / (other + o.eps))
    return (kept, along) if flags & UPPER else (along, kept)


def _gdr_gma(p: Pair, o: Options, flags: int) -> Weights:
    a, b = (torch.where(p.conflict, _ratio(p.fr, square), 0.0) for square in (p.ff, p.rr))
    forget = 1 + a * b if flags & COMPAT else 1.0
    return o.lam * forget - (1 - o.lam) * a, 1 - o.lam - o.lam * b


def _doco(p: Pair, o: Options, flags: int) -> Weights:
    plain, (f, r) = _plain(p, 1, 0), (p.ff.sqrt() + o.eps, p.rr.sqrt() + o.eps)
    published = -o.lam * (p.fr / (f * r)) / r
    return _where(p, (plain[0], published if flags & COMPAT else -o.lam * _ratio(p.fr, p.rr)), plain)


_RULES: Final[dict[int, Callable[[Pair, Options, int], Weights]]] = {
    AGEM: _agem,
    PCGRAD: _pcgrad,
    GRU: _gru,
    BLUR: _blur,
    GDR_GMA: _gdr_gma,
    DOCO: _doco,
}


def clip_factor(square: Tensor, max_norm: float) -> Tensor:
    """What clipping to a norm multiplies by, as `torch.nn.utils.clip_grad_norm_` does it."""
    if max_norm == torch.inf:
        return torch.ones_like(square)
    return (max_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)


def conflict_weights(gramian: Tensor, rule: int, options: Options, flags: int) -> Tensor:
    """Weights (S, 2) from Gramians (S, 2, 2): both gradients clipped, the rule, the result clipped."""
    p = Pair(gramian[:, 0, 0], gramian[:, 0, 1], gramian[:, 1, 1])
    f, r = (clip_factor(x.sum(), options.max_norm) for x in (p.ff, p.rr))
    w = torch.stack(_RULES[rule](Pair(p.ff * f * f, p.fr * f * r, p.rr * r * r), options, flags), dim=1)
    w = w * torch.stack((f, r))
    square = torch.einsum("sa,sab,sb->", w, gramian, w).clamp(min=0.0)
    return w * clip_factor(square, options.max_result_norm)

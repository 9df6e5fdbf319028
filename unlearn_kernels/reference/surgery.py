"""Gradient surgery in plain formulas. Lists of tensors stand for one long vector each, or one a segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels.reference.surgery_elements import project_elements_
from unlearn_kernels.reference.surgery_rules import SKIP_NONFINITE, Options, conflict_weights

GLOBAL, GROUP, TENSOR, ROW, ELEMENT = range(5)


def _split(tensors: Sequence[Tensor], sets: int) -> list[Sequence[Tensor]]:
    count = len(tensors) // sets
    return [tensors[k * count : (k + 1) * count] for k in range(sets)]


def rows(x: Tensor) -> int:
    """How many segments the scope of rows makes of a tensor: its first size; 1 for a vector."""
    return x.shape[0] if x.dim() > 1 else 1


def _pieces(
    g: Sequence[Sequence[Tensor]], scope: int, groups: Sequence[int]
) -> list[tuple[int, list[Tensor]]]:
    """What belongs together, one tensor a set, with the number of its segment."""
    at = list(groups) if scope == GROUP else range(len(g[0])) if scope == TENSOR else [0] * len(g[0])
    together = [list(xs) for xs in zip(*g, strict=True)]
    if scope != ROW:
        return list(zip(at, together, strict=True))
    split = [zip(*(x.unbind() if x.dim() > 1 else (x,) for x in xs), strict=True) for xs in together]
    return list(enumerate(list(xs) for rows in split for xs in rows))


def _segments(first: Sequence[Tensor], scope: int, groups: Sequence[int]) -> int:
    return {GLOBAL: 1, GROUP: max(groups, default=0) + 1, TENSOR: len(first), ROW: sum(map(rows, first))}[
        scope
    ]


def _products(xs: Sequence[Tensor]) -> Tensor:
    wide = [x.double() for x in xs]
    return torch.stack([torch.stack([(x * y).sum() for y in wide]) for x in wide])


def gramian(tensors: Sequence[Tensor], sets: int, scope: int = GLOBAL, groups: Sequence[int] = ()) -> Tensor:
    """`G[a, b] = <g_a, g_b>`, (sets, sets) float64, or (S, sets, sets); tensors set by set."""
    g = _split(tensors, sets)
    out = tensors[0].new_zeros(_segments(g[0], scope, groups), sets, sets, dtype=torch.float64)
    for segment, xs in _pieces(g, scope, groups):
        out[segment] += _products(xs)
    return out[0] if scope == GLOBAL else out


def combine_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    weights: Tensor,
    scope: int = GLOBAL,
    groups: Sequence[int] = (),
) -> None:
    """`out = sum_k w_k g_k`, summed in float64 and rounded once to the dtype of `out`; weights (..., K)."""
    lists = [out, *_split(tensors, weights.shape[-1])]
    sums = [
        (xs[0], sum(w * x.double() for w, x in zip(weights.view(-1, len(xs) - 1)[s], xs[1:], strict=True)))
        for s, xs in _pieces(lists, scope, groups)
    ]
    for o, total in sums:
        o.copy_(total)


def agem_weights(gramian: Tensor) -> Tensor:
    """`(1, -min(0, <f, r>) / |r|^2)`; 0 for a retain gradient of zero; a NaN passes."""
    return conflict_weights(gramian[None], 0, Options(), 0)[0]


def project_conflict_(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rule: int,
    scope: int,
    groups: Sequence[int],
    options: Sequence[float],
    flags: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gramians of (f, r), the weights of what is written, and for single elements the shares of conflicts."""
    tensors, numbers = [*forget, *retain], Options(*options)
    total = gramian(tensors, 2)
    skip = bool(flags & SKIP_NONFINITE) and not bool(total.isfinite().all())
    none = total.new_empty(0, 2, 2)
    if scope == ELEMENT:
        rates = total.new_full((len(forget),), torch.nan)
        if not skip:
            rates = project_elements_(forget, retain, rule, numbers, flags, seed)
        return none, none[:, 0], rates
    G = gramian(tensors, 2, scope, groups)
    weights = conflict_weights(G.view(-1, 2, 2), rule, numbers, flags).view(G.shape[:-1])
    if skip:
        return G, torch.tensor([1.0, 0.0]).to(weights).expand_as(weights).clone(), none[:, 0, 0]
    for segment, (f, r) in _pieces([forget, retain], scope, groups):
        w = weights.view(-1, 2)[segment]
        if w[1] != 0:
            f.copy_(w[0] * f.double() + w[1] * r.double())
        elif w[0] != 1:
            f.copy_(w[0] * f.double())
    return G, weights, none[:, 0, 0]

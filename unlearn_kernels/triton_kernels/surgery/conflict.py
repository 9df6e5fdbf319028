"""`project_conflict_`: the weights of each rule, made on the device, and the rules for single elements."""

from collections.abc import Callable, Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.surgery_rules import COMPAT, SKIP_NONFINITE, UPPER
from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, span
from unlearn_kernels.triton_kernels.surgery.elements import project_elements
from unlearn_kernels.triton_kernels.surgery.sums import (
    Combine,
    combine_table,
    gramians_of,
    single_is_enough,
)
from unlearn_kernels.triton_kernels.surgery.tables import (
    ELEMENT,
    ROW,
    Table,
    copy_back,
    made_dense,
    refuse_overlap,
    table_of,
)  # fmt: skip

_BLOCK: Final = 256


@triton.jit
def ratio(x, y):
    """x / y, 0 where y is. NaN passes."""
    return tl.where(y == 0, 0.0, x / tl.where(y == 0, 1.0, y))


@triton.jit
def number(numbers, AT: tl.constexpr):
    """One of the rule's numbers, float64."""
    return tl.load(numbers + AT).to(tl.float64)


@triton.jit
def load_products(gramians, at, inside):
    """<f, f>, <f, r> and <r, r> of a block of segments."""
    ff = tl.load(gramians + 4 * at, mask=inside, other=0.0).to(tl.float64)
    fr = tl.load(gramians + 4 * at + 1, mask=inside, other=0.0).to(tl.float64)
    rr = tl.load(gramians + 4 * at + 3, mask=inside, other=0.0).to(tl.float64)
    return ff, fr, rr


@triton.jit
def clip_factor(square, most):
    """What clipping to a norm multiplies by."""
    c = most / (tl.sqrt(square) + 1e-6)
    return tl.where((c > 1) | (most == float("inf")), 1.0, c)


@triton.jit
def pair_weights(
    ff, fr, rr, numbers, RULE: tl.constexpr, COMPATIBLE: tl.constexpr, UPPER_LEVEL: tl.constexpr
):
    """Weights of forget and retain; the formulas are those of `reference.surgery_rules`."""
    gamma, alpha, eps, lam = number(numbers, 0), number(numbers, 1), number(numbers, 2), number(numbers, 3)
    conflict = (fr >= 0) == 0
    one = tl.full(ff.shape, 1.0, dtype=tl.float64)
    f, r = one, one * 0
    if RULE == 0:
        f = one * gamma
        moved = alpha - tl.where(rr == 0, 0.0, gamma * fr / tl.where(rr == 0, 1.0, rr + eps))
        r = tl.where(conflict, moved, alpha)
    if RULE == 1:
        f = tl.where(conflict, gamma - alpha * ratio(fr, ff), gamma)
        r = tl.where(conflict, alpha - gamma * ratio(fr, rr), alpha)
    if RULE == 2:
        most = number(numbers, 4)
        cosine = ratio(fr, tl.sqrt(ff) * tl.sqrt(rr))
        limited = most * ratio(tl.sqrt(ff), tl.sqrt(rr))
        r = tl.where(conflict, tl.where(cosine < -most, limited, -ratio(fr, rr)), 0.0)
    if RULE == 3:
        other = rr if UPPER_LEVEL else ff
        along = tl.where(other == 0, 0.0, gamma - alpha * fr / tl.where(other == 0, 1.0, other + eps))
        kept = one * alpha
        f = kept if UPPER_LEVEL else along
        r = along if UPPER_LEVEL else kept
    if RULE == 4:
        a, b = tl.where(conflict, ratio(fr, ff), 0.0), tl.where(conflict, ratio(fr, rr), 0.0)
        forget = 1 + a * b if COMPATIBLE else one
        f = lam * forget - (1 - lam) * a
        r = 1 - lam - lam * b
    if RULE == 5:
        size, other = tl.sqrt(ff) + eps, tl.sqrt(rr) + eps
        moved = -lam * (fr / (size * other)) / other if COMPATIBLE else -lam * ratio(fr, rr)
        r = tl.where(conflict, moved, 0.0)
    return f, r


@triton.jit
def clipped_weights(
    ff, fr, rr, c, d, numbers, RULE: tl.constexpr, COMPATIBLE: tl.constexpr, UPPER_LEVEL: tl.constexpr
):
    """The weights after both gradients have been clipped by the factors c and d."""
    f, r = pair_weights(ff * c * c, fr * c * d, rr * d * d, numbers, RULE, COMPATIBLE, UPPER_LEVEL)
    return f * c, r * d


@triton.jit
def rule_kernel(
    gramians, numbers, weights, count, RULE: tl.constexpr, COMPATIBLE: tl.constexpr, UPPER_LEVEL: tl.constexpr,
    SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights (count, 2) from Gramians (count, 2, 2), in one program: both clips need all of them."""
    sums_ff = tl.zeros((BLOCK,), dtype=tl.float64)
    sums_fr, sums_rr = sums_ff, sums_ff
    for start in range(0, count, BLOCK):
        at = span(start, BLOCK)
        ff, fr, rr = load_products(gramians, at, at < count)
        sums_ff += ff
        sums_fr += fr
        sums_rr += rr
    total_ff, total_fr, total_rr = tl.sum(sums_ff, axis=0), tl.sum(sums_fr, axis=0), tl.sum(sums_rr, axis=0)
    c = clip_factor(total_ff, number(numbers, 5))
    d = clip_factor(total_rr, number(numbers, 5))
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        at = span(start, BLOCK)
        ff, fr, rr = load_products(gramians, at, at < count)
        f, r = clipped_weights(ff, fr, rr, c, d, numbers, RULE, COMPATIBLE, UPPER_LEVEL)
        squares += tl.where(at < count, f * f * ff + 2 * f * r * fr + r * r * rr, 0.0)
    square = tl.sum(squares, axis=0)
    e = clip_factor(tl.where(square < 0, 0.0, square), number(numbers, 6))
    finite = (total_ff + total_rr + tl.abs(total_fr)) * 0 == 0
    for start in range(0, count, BLOCK):
        at = span(start, BLOCK)
        ff, fr, rr = load_products(gramians, at, at < count)
        f, r = clipped_weights(ff, fr, rr, c, d, numbers, RULE, COMPATIBLE, UPPER_LEVEL)
        f, r = f * e, r * e
        if SKIP:
            f, r = tl.where(finite, f, 1.0), tl.where(finite, r, 0.0)
        tl.store(weights + 2 * at, f, mask=at < count)
        tl.store(weights + 2 * at + 1, r, mask=at < count)


def rule_weights(gramians: Tensor, rule: int, options: Tensor, flags: int) -> Tensor:
    """Weights (S, 2) from Gramians (S, 2, 2); `options` on their device."""
    weights = torch.empty(len(gramians), 2, dtype=torch.float64, device=gramians.device)
    with on_device(gramians):
        rule_kernel[(1,)](
            gramians, options, weights, len(gramians), RULE=rule, COMPATIBLE=bool(flags & COMPAT),
            UPPER_LEVEL=bool(flags & UPPER), SKIP=bool(flags & SKIP_NONFINITE), BLOCK=_BLOCK,
            **launch_options(),
        )  # fmt: skip
    return weights


def _decide(
    table: Table, rule: int, numbers: Tensor, options: Sequence[float], flags: int
) -> tuple[Tensor, Tensor]:
    G = gramians_of(table)
    return G, rule_weights(G, rule, numbers, flags)


# Gramians (S, 2, 2) and weights (S, 2) of a rule; its numbers on the device and on the host.
Decide = Callable[[Table, int, Tensor, Sequence[float], int], tuple[Tensor, Tensor]]
Elements = Callable[[Sequence[Tensor], Sequence[Tensor], int, Tensor, Sequence[float], int, int], Tensor]


def project_conflict_(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rule: int,
    scope: int,
    groups: Sequence[int],
    options: Sequence[float],
    flags: int,
    seed: int,
    decide: Decide = _decide,
    combine: Combine = combine_table,
    elements: Elements = project_elements,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator `project_conflict_`: two passes, or one for elements, and no wait for the device."""
    refuse_overlap(forget, retain)
    numbers = torch.tensor(options, dtype=torch.float64).to(forget[0].device, non_blocking=True)
    if scope == ELEMENT:
        rates = elements(forget, retain, rule, numbers, options, flags, seed)
        none = rates.new_empty(0, 2, 2)
        return none, none[:, 0], rates
    made = made_dense([forget, retain], indexed=scope == ROW)
    table = table_of(made, scope, groups)
    G, weights = decide(table, rule, numbers, options, flags)
    combine(table, 0, weights, single_is_enough(table, forget), True)
    copy_back(forget, made[0])
    return (G, weights, G.new_empty(0)) if scope else (G[0], weights[0], G.new_empty(0))


def _case(rule: int, flags: int) -> AotCase:
    constants = {
        "RULE": rule, "COMPATIBLE": bool(flags & COMPAT), "UPPER_LEVEL": bool(flags & UPPER),
        "SKIP": bool(flags & SKIP_NONFINITE), "BLOCK": _BLOCK,
    }  # fmt: skip
    return AotCase(rule_kernel, dict.fromkeys(("gramians", "numbers", "weights"), "fp64"), constants)


AOT: Final = (*(_case(rule, 0) for rule in range(6)), _case(3, UPPER), _case(4, COMPAT), _case(5, COMPAT | 8))

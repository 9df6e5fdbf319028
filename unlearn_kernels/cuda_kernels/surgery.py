"""Gradient surgery, AdamW and masks over lists of tensors in CUDA C++, over the tables of the Triton kernels."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.cuda_kernels.native import code_of, lists_of, run
from unlearn_kernels.reference.surgery_rules import SKIP_NONFINITE, Options
from unlearn_kernels.triton_kernels.surgery import adamw, conflict, elements, masks, sums
from unlearn_kernels.triton_kernels.surgery.tables import Table, addresses_of, moved, table_of


def _gramians(table: Table) -> Tensor:
    """Two launches. Scratch: `8 lists^2` bytes a chunk of 16384 elements."""
    sets, device = table.lists, table.addresses.device
    parts = torch.empty(sets * sets, table.tasks, dtype=torch.float64, device=device)
    out = torch.empty(table.sums, sets, sets, dtype=torch.float64, device=device)
    if out.numel() > 0:
        wanted = (sets, code_of(table), table.single, parts, table.firsts, table.sums, out)
        run("gramian", device, *lists_of(table), *wanted)
    return out


def _combine(table: Table, first: int, weights: Tensor, single: bool, sparing: bool) -> None:
    """One launch, no scratch."""
    kinds = (first, table.lists - first, code_of(table), single, sparing)
    run("combine", weights.device, *lists_of(table), *kinds, weights)


def _decide(
    table: Table, rule: int, numbers: Tensor, options: Sequence[float], flags: int
) -> tuple[Tensor, Tensor]:
    """A launch over the lists and one over the segments; another where all weights depend on all segments."""
    device, named = numbers.device, Options(*options)
    clips = not (math.isinf(named.max_norm) and math.isinf(named.max_result_norm))
    together = table.sums > 1 and (clips or bool(flags & SKIP_NONFINITE))
    parts = torch.empty(4, table.tasks, dtype=torch.float64, device=device)
    G = torch.empty(table.sums, 2, 2, dtype=torch.float64, device=device)
    weights = torch.empty(table.sums, 2, dtype=torch.float64, device=device)
    of = (code_of(table), table.single, parts, table.firsts, table.sums, numbers, rule, flags, together)
    run("conflict_weights", device, *lists_of(table), *of, G, weights)
    return G, weights


def _act(
    table: Table,
    numbering: Tensor,
    total: Tensor | None,
    numbers: Tensor,
    seed: int,
    rule: elements.ElementRule,
) -> Tensor:
    """A launch over the lists and one over the tensors."""
    clashes = torch.empty(table.tasks, dtype=torch.float64, device=numbers.device)
    out = torch.empty(table.sums, dtype=torch.float64, device=numbers.device)
    kinds = (code_of(table), numbering, total, numbers, seed, *rule)
    run("elements", numbers.device, *lists_of(table), *kinds, clashes, table.firsts, table.sums, out)
    return out


def _update(
    table: Table, weights: Tensor, groups: Tensor, group_of: Tensor, steps: Tensor, wide: Tensor, stochastic: bool,
    seed: int, _: bool,
) -> None:  # fmt: skip
    """Two launches."""
    kinds = (weights.numel(), code_of(table), table.single)
    run(
        "adamw",
        weights.device,
        *lists_of(table),
        *kinds,
        weights,
        groups,
        group_of,
        steps,
        wide,
        seed,
        stochastic,
    )


def _fill(
    tensors: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], counts: Sequence[int], bits: bool
) -> None:
    table = table_of([tensors])
    if table.tasks == 0:
        return
    device, many = table.addresses.device, len(counts)
    head = (*lists_of(table), many, table.single)
    cuts, takes = torch.zeros(many, dtype=torch.int64, device=device), moved(counts, torch.int64, device)
    for above, shift in masks.digits(table.single):
        first = above == masks.BITS[table.single]
        histograms = torch.zeros(1 if first else many, masks.BINS, dtype=torch.int64, device=device)
        run("mask_digit", device, *head, above, shift, first, cuts, takes, histograms)
    ties = torch.empty(many, table.tasks, dtype=torch.int64, device=device)
    run("mask_ties", device, *head, cuts, ties)
    outs = addresses_of([x for row in rows for x in row], device)
    run("mask_take", device, *head, cuts, takes, ties.cumsum(1) - ties, outs, bits)


# The raw operators: tables, copies and checks are those of the Triton kernels.
gramian: Final = partial(sums.gramian, gramians=_gramians)
combine_: Final = partial(sums.combine_, combine=_combine)
project_conflict_: Final = partial(
    conflict.project_conflict_,
    decide=_decide,
    combine=_combine,
    elements=partial(elements.project_elements, gramians=_gramians, act=_act),
)
surgical_adamw_: Final = partial(adamw.surgical_adamw_, update=_update)
topk_mask: Final = partial(masks.topk_mask, fill=_fill)

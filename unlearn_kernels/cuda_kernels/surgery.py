"""Gramians, weighted sums, AdamW and masks over lists of tensors in CUDA C++, over the tables of the Triton kernels."""

from collections.abc import Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.cuda_kernels.native import code_of, lists_of, run
from unlearn_kernels.triton_kernels.surgery import adamw, masks, sums
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


def _combine(table: Table, weights: Tensor, single: bool) -> None:
    """One launch, no scratch."""
    run("combine", weights.device, *lists_of(table), table.lists - 1, code_of(table), single, weights)


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
surgical_adamw_: Final = partial(adamw.surgical_adamw_, update=_update)
topk_mask: Final = partial(masks.topk_mask, fill=_fill)

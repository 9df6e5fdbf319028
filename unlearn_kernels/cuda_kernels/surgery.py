"""Gramians, weighted sums, AdamW and masks over lists of tensors in CUDA C++, over the tables of the Triton kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels.cuda_kernels.native import code_of, lists_of, run
from unlearn_kernels.triton_kernels.surgery import masks
from unlearn_kernels.triton_kernels.surgery.sums import single_is_enough
from unlearn_kernels.triton_kernels.surgery.tables import (
    ROW,
    addresses_of,
    copy_back,
    made_dense,
    moved,
    refuse_overlap,
    table_of,
)


def gramian(tensors: Sequence[Tensor], sets: int, scope: int = 0, groups: Sequence[int] = ()) -> Tensor:
    """The raw operator `gramian`: two launches. Scratch: `8 sets^2` bytes a chunk of 16384 elements."""
    count = len(tensors) // sets
    lists = made_dense([tensors[k * count : (k + 1) * count] for k in range(sets)], indexed=scope == ROW)
    table = table_of(lists, scope, groups)
    device = table.addresses.device
    parts = torch.empty(sets * sets, table.tasks, dtype=torch.float64, device=device)
    out = torch.empty(table.sums, sets, sets, dtype=torch.float64, device=device)
    if out.numel() > 0:
        wanted = (sets, code_of(table), table.single, parts, table.firsts, table.sums, out)
        run("gramian", device, *lists_of(table), *wanted)
    return out if scope else out[0]


def combine_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    weights: Tensor,
    scope: int = 0,
    groups: Sequence[int] = (),
) -> None:
    """The raw operator `combine_`: one launch, no scratch."""
    if not out:
        return
    refuse_overlap(out, tensors)
    sets = [tensors[at : at + len(out)] for at in range(0, len(tensors), len(out))]
    made = made_dense([out, *sets], indexed=scope == ROW)
    table = table_of(made, scope, groups)
    single = single_is_enough(table, out)
    run(
        "combine",
        weights.device,
        *lists_of(table),
        len(sets),
        code_of(table),
        single,
        weights.contiguous(),
    )
    copy_back(out, made[0])


def surgical_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Tensor,
    groups: Tensor,
    group_of: Sequence[int],
    stochastic: bool,
    seed: int,
) -> None:
    """The raw operator `surgical_adamw_`: two launches and no wait for the device."""
    if not params:
        return
    n, device = len(params), params[0].device
    refuse_overlap(params, gradients)
    sets = [gradients[at : at + n] for at in range(0, len(gradients), n)]
    made = made_dense([params, exp_avgs, exp_avg_sqs, *sets])
    table = table_of(made)
    wide = moved([s.dtype == torch.float64 for s in steps], torch.int32, device)
    run(
        "adamw",
        device,
        *lists_of(table),
        len(sets),
        code_of(table),
        table.single,
        weights.contiguous(),
        groups.contiguous(),
        moved(group_of, torch.int32, device),
        addresses_of(steps, device),
        wide,
        seed,
        stochastic,
    )
    for to, copy in zip((params, exp_avgs, exp_avg_sqs), made, strict=False):
        copy_back(to, copy)


def topk_mask(tensors: Sequence[Tensor], counts: Sequence[int], by_tensor: bool, bits: bool) -> list[Tensor]:
    """The raw operator `topk_mask`: two launches a digit of 11 bits, and two. Tensors not contiguous are copied."""
    return masks.topk_mask(tensors, counts, by_tensor, bits, fill=_fill)


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

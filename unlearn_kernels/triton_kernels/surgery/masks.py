"""Masks of the k elements of largest magnitude by radix selection, and gradients under a mask.

Keys are the bits of |x| in the widest type of the list plus one, 0 for NaN. A histogram of a digit a chunk is written
out and added up, a program a mask finds the bin in which the last element lies; nothing leaves the device.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, program, span
from unlearn_kernels.triton_kernels.surgery.sums import TABLE_TYPES, bounds, store_row, typed
from unlearn_kernels.triton_kernels.surgery.tables import (
    Table,
    addresses_of,
    copy_back,
    moved,
    refuse_overlap,
    table_of,
)

_DIGIT: Final = 11
BINS: Final = 1 << _DIGIT
_BLOCK: Final = 1024
BITS: Final = {True: 31, False: 63}  # of a key, where no tensor is float64 and where one is


@triton.jit
def load_one(base, code, at, inside, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr):
    """Elements `at` of one tensor; 0 outside."""
    x = tl.zeros(at.shape, dtype=ACC)
    if TYPES & 1:
        x += tl.load(typed(base, tl.float32, ALIGNED) + at, mask=inside & (code == 0), other=0.0).to(ACC)
    if TYPES & 2:
        x += tl.load(typed(base, tl.float64, ALIGNED) + at, mask=inside & (code == 1), other=0.0).to(ACC)
    if TYPES & 4:
        x += tl.load(typed(base, tl.bfloat16, ALIGNED) + at, mask=inside & (code == 2), other=0.0).to(ACC)
    if TYPES & 8:
        x += tl.load(typed(base, tl.float16, ALIGNED) + at, mask=inside & (code == 3), other=0.0).to(ACC)
    return x


@triton.jit
def keys_of(x):
    """The keys as int64."""
    if x.dtype == tl.float64:
        magnitude = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        infinity = 0x7FF0000000000000
    else:
        magnitude = x.to(tl.int32, bitcast=True).to(tl.int64) & 0x7FFFFFFF
        infinity = 0x7F800000
    return tl.where(magnitude > infinity, 0, magnitude + 1)


@triton.jit
def digit_kernel(
    addresses, codes, positions, starts, stops, segments, prefixes, histograms, above, shift, tasks,
    FIRST: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """histograms[mask, task]: of the digit from bit `shift` on, of the keys that begin with the mask's prefix."""
    task, mask = program(0), program(1)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    base, code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
    prefix = tl.load(prefixes + mask).to(tl.int64)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        inside = at < stop
        keys = keys_of(load_one(base, code, at, inside, TYPES, ACC, ALIGNED))
        wanted = inside if FIRST else inside & ((keys >> above) == prefix)
        digit = ((keys >> shift) & ((1 << (above - shift)) - 1)).to(tl.int32)
        counts += tl.histogram(tl.where(wanted, digit, 0), BINS)
        # What is not wanted was counted as 0.
        missed = tl.sum((wanted == 0).to(tl.int32), axis=0)
        counts -= tl.where(tl.arange(0, BINS) == 0, missed, 0)
    tl.store(histograms + (mask * tasks + task) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def bin_kernel(histograms, prefixes, takes, width, tasks, shared, BINS: tl.constexpr):
    """Moves each mask's prefix to the bin of its last element, and `takes` to how many of that bin it takes."""
    mask = program(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int64)
    for task in range(0, tasks):
        counts += tl.load(histograms + (mask * (1 - shared) * tasks + task) * BINS + bins).to(tl.int64)
    take = tl.load(takes + mask).to(tl.int64)
    below = tl.cumsum(counts, axis=0)
    above = tl.sum(counts, axis=0) - below
    last = tl.sum(tl.where((above < take) & (above + counts >= take), bins.to(tl.int64), 0), axis=0)
    before = tl.sum(tl.where(bins.to(tl.int64) == last, above, 0), axis=0)
    prefix = tl.load(prefixes + mask).to(tl.int64)
    tl.store(prefixes + mask, (prefix << width) | last)
    tl.store(takes + mask, take - before)


@triton.jit
def ties_kernel(
    addresses, codes, positions, starts, stops, segments, keys_at, ties, tasks, BLOCK: tl.constexpr,
    TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """ties[mask, task]: elements whose key is the mask's."""
    task, mask = program(0), program(1)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    base, code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
    key = tl.load(keys_at + mask).to(tl.int64)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        keys = keys_of(load_one(base, code, at, at < stop, TYPES, ACC, ALIGNED))
        count += ((at < stop) & (keys == key)).to(tl.int32)
    tl.store(ties + mask * tasks + task, tl.sum(count, axis=0).to(tl.int64))


@triton.jit
def take_kernel(
    addresses, codes, positions, starts, stops, segments, keys_at, takes, before, outs, count, tasks,
    BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Writes each mask: keys above its own, of the equal ones the first `takes`; `before` are in earlier chunks."""
    task, mask = program(0), program(1)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    base, code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
    out = tl.load(outs + mask * count + position).to(tl.int64).to(tl.pointer_type(tl.uint8))
    key = tl.load(keys_at + mask).to(tl.int64)
    takes_of = tl.load(takes + mask).to(tl.int64)  # 0 only where the mask is to be empty
    left = takes_of - tl.load(before + mask * tasks + task).to(tl.int64)
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        inside = at < stop
        keys = keys_of(load_one(base, code, at, inside, TYPES, ACC, ALIGNED))
        equal = (inside & (keys == key)).to(tl.int64)
        taken = (inside & (keys > key) & (takes_of > 0)) | ((equal == 1) & (tl.cumsum(equal, axis=0) <= left))
        left -= tl.sum(equal, axis=0)
        if BITS:
            weights = (1 << (tl.arange(0, BLOCK) & 7)).to(tl.int32)
            packed = tl.sum((taken.to(tl.int32) * weights).reshape(BLOCK // 8, 8), axis=1)
            byte = (start + offset) // 8 + tl.arange(0, BLOCK // 8).to(tl.int64)
            tl.store(out + byte, packed.to(tl.uint8), mask=byte * 8 < stop)
        else:
            tl.store(out + at, taken.to(tl.uint8), mask=inside)


@triton.jit
def apply_kernel(
    addresses, codes, positions, starts, stops, segments, masks, packed, BLOCK: tl.constexpr, TYPES: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Zero where the mask, a byte or (packed) a bit an element, is."""
    task = program(0)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    base, code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
    mask = tl.load(masks + position).to(tl.int64).to(tl.pointer_type(tl.uint8))
    bits = tl.load(packed + position).to(tl.int32)
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        inside = at < stop
        byte = tl.load(mask + tl.where(bits != 0, at // 8, at), mask=inside, other=1).to(tl.int32)
        kept = tl.where(bits != 0, (byte >> (at % 8).to(tl.int32)) & 1, byte)
        x = load_one(base, code, at, inside & (kept != 0), TYPES, ACC, ALIGNED)
        store_row(base, code, at, inside & (kept == 0), x, TYPES, ALIGNED)


def _acc(table: Table) -> tl.dtype:
    return tl.float32 if table.single else tl.float64


def _settings(table: Table) -> dict[str, Any]:
    return {"BLOCK": _BLOCK, "TYPES": table.types, "ACC": _acc(table), "ALIGNED": table.aligned}


def digits(single: bool) -> Iterator[tuple[int, int]]:
    """The bits above and below each digit of a key, the highest first."""
    above = BITS[single]
    while above > 0:
        yield above, max(0, above - _DIGIT)
        above -= _DIGIT


def _cuts(table: Table, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The key of each mask's last element, and how many equal to it are taken."""
    device, masks = table.addresses.device, len(counts)
    prefixes = torch.zeros(masks, dtype=torch.int64, device=device)
    takes = torch.tensor(counts).to(device, non_blocking=True)
    for above, shift in digits(table.single):
        first = above == BITS[table.single]
        histograms = torch.empty(1 if first else masks, table.tasks, BINS, dtype=torch.int32, device=device)
        digit_kernel[(table.tasks, 1 if first else masks)](
            *table.tensors(), prefixes, histograms, above, shift, table.tasks, FIRST=first, BINS=BINS,
            **_settings(table), **launch_options(),
        )  # fmt: skip
        sums = histograms.sum(1, keepdim=True)  # integers: the same in any order
        bin_kernel[(masks,)](
            sums, prefixes, takes, above - shift, 1, int(first), BINS=BINS, **launch_options()
        )
    return prefixes, takes


def _fill(
    tensors: Sequence[Tensor], rows: Sequence[Sequence[Tensor]], counts: Sequence[int], bits: bool
) -> None:
    table = table_of([tensors])
    if table.tasks == 0:
        return
    device = table.addresses.device
    outs = addresses_of([x for row in rows for x in row], device)
    with on_device(table.addresses):
        keys, takes = _cuts(table, counts)
        ties = torch.empty(len(counts), table.tasks, dtype=torch.int64, device=device)
        grid = (table.tasks, len(counts))
        ties_kernel[grid](*table.tensors(), keys, ties, table.tasks, **_settings(table), **launch_options())
        take_kernel[grid](
            *table.tensors(), keys, takes, ties.cumsum(1) - ties, outs, len(tensors), table.tasks,
            BITS=bits, **_settings(table), **launch_options(),
        )  # fmt: skip


# (tensors, a row of outputs a mask, elements a mask, packed)
Fill = Callable[[Sequence[Tensor], Sequence[Sequence[Tensor]], Sequence[int], bool], None]


def topk_mask(
    tensors: Sequence[Tensor], counts: Sequence[int], by_tensor: bool, bits: bool, fill: Fill = _fill
) -> list[Tensor]:
    """The raw operator `topk_mask`. Tensors that are not contiguous are copied."""
    n = len(tensors)
    made = [x.contiguous() for x in tensors]
    masks = len(counts) // (n if by_tensor else 1)
    rows = [
        [
            x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
            if bits
            else x.new_empty(x.shape, dtype=torch.bool)
            for x in tensors
        ]
        for _ in range(masks)
    ]
    if not by_tensor:
        fill(made, rows, counts, bits)
    else:
        for i, x in enumerate(made):
            fill([x], [row[i : i + 1] for row in rows], counts[i::n], bits)
    return [mask for row in rows for mask in row]


def apply_mask_(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """The raw operator `apply_mask_`."""
    refuse_overlap(tensors, [])
    made, ordered = [x.contiguous() for x in tensors], [m.contiguous() for m in masks]
    table = table_of([made])
    if table.tasks > 0:
        device = table.addresses.device
        packed = moved([m.dtype == torch.uint8 for m in masks], torch.int32, device)
        with on_device(table.addresses):
            apply_kernel[(table.tasks,)](
                *table.tensors(),
                addresses_of(ordered, device),
                packed,
                **_settings(table),
                **launch_options(),
            )
    copy_back(tensors, made)


def _case(kernel: Any, types: int, pointers: dict[str, str], **more: Any) -> AotCase:
    acc = tl.float64 if types & 2 else tl.float32
    constants = {"BLOCK": _BLOCK, "TYPES": types, "ACC": acc, "ALIGNED": types != 15, **more}
    return AotCase(kernel, {**TABLE_TYPES, **pointers}, constants)


_LONG: Final = {"keys_at": "i64", "takes": "i64", "before": "i64", "outs": "i64"}
AOT: Final = (
    *(
        _case(digit_kernel, types, {"prefixes": "i64", "histograms": "i32"}, FIRST=first, BINS=BINS)
        for types, first in ((1, True), (1, False), (4, False), (15, False))
    ),
    AotCase(bin_kernel, {"histograms": "i64", "prefixes": "i64", "takes": "i64"}, {"BINS": BINS}),
    *(_case(ties_kernel, types, {"keys_at": "i64", "ties": "i64"}) for types in (1, 15)),
    *(_case(take_kernel, types, _LONG, BITS=bits) for types, bits in ((1, False), (1, True), (15, True))),
    *(_case(apply_kernel, types, {"masks": "i64", "packed": "i32"}) for types in (1, 4, 15)),
)

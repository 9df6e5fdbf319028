"""Gramians and weighted sums over lists of tensors."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import (
    block_size,
    launch_options,
    load_as,
    on_device,
    program,
    span,
    store_as,
)  # fmt: skip
from unlearn_kernels.triton_kernels.surgery.tables import (
    ROW,
    Table,
    copy_back,
    made_dense,
    refuse_overlap,
    table_of,
)  # fmt: skip


@triton.jit
def typed(base, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Addresses as pointers, known to be multiples of 16 bytes if ALIGNED."""
    pointers = base.to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
def choose(base, code, at, inside, x, CODE: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """`x` with the rows of that code replaced by their elements."""
    mine = (code == CODE)[:, None]
    pointers = typed(base, DTYPE, ALIGNED)[:, None] + at[None, :]
    return tl.where(mine, tl.load(pointers, mask=mine & inside[None, :], other=0.0).to(x.dtype), x)


@triton.jit
def load_rows(
    base, code, at, inside, TYPES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Elements `at` of each list, (ROWS, BLOCK); 0 outside and in the rows that pad the lists."""
    x = tl.zeros((ROWS, BLOCK), dtype=ACC)
    if TYPES & 1:
        x = choose(base, code, at, inside, x, 0, tl.float32, ALIGNED)
    if TYPES & 2:
        x = choose(base, code, at, inside, x, 1, tl.float64, ALIGNED)
    if TYPES & 4:
        x = choose(base, code, at, inside, x, 2, tl.bfloat16, ALIGNED)
    if TYPES & 8:
        x = choose(base, code, at, inside, x, 3, tl.float16, ALIGNED)
    return x


@triton.jit
def store_row(base, code, at, inside, x, TYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Stores one row in the type of its memory. `base` and `code` have one element."""
    if TYPES & 1:
        to = typed(base, tl.float32, ALIGNED) + at
        tl.store(to, x.to(tl.float32), mask=inside & (code == 0))
    if TYPES & 2:
        to = typed(base, tl.float64, ALIGNED) + at
        tl.store(to, x.to(tl.float64), mask=inside & (code == 1))
    if TYPES & 4:
        to = typed(base, tl.bfloat16, ALIGNED) + at
        tl.store(to, x.to(tl.float32).to(tl.bfloat16), mask=inside & (code == 2))
    if TYPES & 8:
        to = typed(base, tl.float16, ALIGNED) + at
        tl.store(to, x.to(tl.float32).to(tl.float16), mask=inside & (code == 3))


@triton.jit
def bounds(starts, stops, task, ALIGNED: tl.constexpr):
    """The first element of a chunk and the one behind its last."""
    start, stop = tl.load(starts + task).to(tl.int64), tl.load(stops + task).to(tl.int64)
    if ALIGNED:
        start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
    return start, stop


@triton.jit
def chunk_gramian(
    base, code, start, stop, TYPES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """(ROWS, ROWS) float64 inner products over one chunk, in lanes of ACC."""
    lanes = tl.zeros((ROWS, ROWS, BLOCK), dtype=ACC)
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        x = load_rows(base, code, at, at < stop, TYPES, ROWS, BLOCK, ACC, ALIGNED)
        lanes += x[:, None, :] * x[None, :, :]
    return tl.sum(lanes.to(tl.float64), axis=2)


@triton.jit
def gramian_kernel(
    addresses, codes, positions, starts, stops, segments, parts, count, tasks, LISTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """parts[a, b, task] = <g_a, g_b> over the chunk. Again in float64 where squares leave float32's range."""
    task = program(0)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    row = tl.arange(0, ROWS).to(tl.int64)
    base = tl.load(addresses + row * count + position, mask=row < LISTS, other=0).to(tl.int64)
    code = tl.load(codes + row * count + position, mask=row < LISTS, other=-1).to(tl.int32)
    sums = chunk_gramian(base, code, start, stop, TYPES, ROWS, BLOCK, ACC, ALIGNED)
    if tl.float32 == ACC:
        diagonal = (row[:, None] == row[None, :]) & (row < LISTS)[:, None]
        in_range = (sums >= 1e-24) & (sums <= 1e36)
        outside = tl.sum((diagonal & (in_range == 0)).to(tl.int32).reshape(ROWS * ROWS), axis=0)
        if outside > 0:
            sums = chunk_gramian(base, code, start, stop, TYPES, ROWS, BLOCK, tl.float64, ALIGNED)
    at = parts + (row[:, None] * LISTS + row[None, :]) * tasks + task
    tl.store(at, sums, mask=(row < LISTS)[:, None] & (row < LISTS)[None, :])


@triton.jit
def segment_sums_kernel(parts, firsts, out, tasks, BLOCK: tl.constexpr):
    """out[segment, value] = sum of parts[value, task] over the tasks of the segment, in their order."""
    segment, value, values = program(0), program(1), tl.num_programs(1).to(tl.int64)
    first, end = tl.load(firsts + segment).to(tl.int64), tl.load(firsts + segment + 1).to(tl.int64)
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(first, end, BLOCK):
        at = span(start, BLOCK)
        acc += load_as(parts + value * tasks + at, at < end, tl.float64)
    store_as(out + segment * values + value, tl.sum(acc, axis=0), True)


@triton.jit
def combine_kernel(
    addresses, codes, positions, starts, stops, segments, weights, count, FIRST: tl.constexpr,
    LISTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr, SPARING: tl.constexpr,
):  # fmt: skip
    """List 0 = sum of weights[segment, k] * list (FIRST + k) over the chunk.

    SPARING: lists of weight 0 are not read, and nothing is done where the weights are 1, 0, 0, ...
    """
    task = program(0)
    row = tl.arange(0, ROWS).to(tl.int64)
    segment = tl.load(segments + task).to(tl.int64)
    w = tl.load(weights + segment * LISTS + row, mask=row < LISTS, other=0.0).to(tl.float64)
    wanted = 1
    if SPARING:
        wanted = tl.sum((w != tl.where(row == 0, 1.0, 0.0)).to(tl.int32), axis=0)
    if wanted > 0:
        position = tl.load(positions + task).to(tl.int64)
        start, stop = bounds(starts, stops, task, ALIGNED)
        base = tl.load(addresses + (FIRST + row) * count + position, mask=row < LISTS, other=0).to(tl.int64)
        code = tl.load(codes + (FIRST + row) * count + position, mask=row < LISTS, other=-1).to(tl.int32)
        if SPARING:
            code = tl.where(w == 0, -1, code)
        out, out_code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
        for offset in range(0, stop - start, BLOCK):
            at = span(start + offset, BLOCK)
            x = load_rows(base, code, at, at < stop, TYPES, ROWS, BLOCK, ACC, ALIGNED)
            total = tl.sum(x * w.to(ACC)[:, None], axis=0)
            store_row(out, out_code, at, at < stop, total, TYPES, ALIGNED)


def blocks(lists: int, lanes: int) -> dict[str, int]:
    """Rows of a block, one a list and a power of two, and its length."""
    rows = max(2, triton.next_power_of_2(lists))
    return {"ROWS": rows, "BLOCK": max(16, min(1024, lanes // rows))}


def _lanes(types: int) -> int:
    """Lanes of a combination: fewer where each element type takes registers of its own."""
    return 4096 if types.bit_count() == 1 else 2048


def segment_sums(parts: Tensor, table: Table) -> Tensor:
    """(segments, values) sums of parts (values, tasks)."""
    values, tasks = parts.shape
    out = torch.empty(table.sums, values, dtype=torch.float64, device=parts.device)
    if out.numel() > 0:
        block = block_size(min(tasks, 1024), 1024)
        with on_device(parts):
            segment_sums_kernel[(table.sums, values)](
                parts, table.firsts, out, tasks, BLOCK=block, **launch_options()
            )
    return out


def gramians_of(table: Table) -> Tensor:
    """(segments, lists, lists) float64."""
    lists, device = table.lists, table.addresses.device
    parts = torch.empty(lists * lists, table.tasks, dtype=torch.float64, device=device)
    if table.tasks > 0:
        acc = tl.float32 if table.single else tl.float64
        with on_device(parts):
            gramian_kernel[(table.tasks,)](
                *table.tensors(), parts, table.addresses.shape[1], table.tasks, LISTS=lists,
                **blocks(lists, 4096 // max(2, triton.next_power_of_2(lists))), TYPES=table.types, ACC=acc,
                ALIGNED=table.aligned, **launch_options(),
            )  # fmt: skip
    return segment_sums(parts, table).view(-1, lists, lists)


# A combination of the lists from `first` on with weights (segments, terms), float64: `single`, `sparing`.
Combine = Callable[[Table, int, Tensor, bool, bool], None]


def combine_table(table: Table, first: int, weights: Tensor, single: bool, sparing: bool) -> None:
    """One launch."""
    if table.tasks == 0:
        return
    lists, acc = table.lists - first, tl.float32 if single else tl.float64
    with on_device(weights):
        combine_kernel[(table.tasks,)](
            *table.tensors(), weights, table.addresses.shape[1], FIRST=first, LISTS=lists,
            **blocks(lists, _lanes(table.types)), TYPES=table.types, ACC=acc, ALIGNED=table.aligned,
            SPARING=sparing, **launch_options(),
        )  # fmt: skip


def single_is_enough(table: Table, out: Sequence[Tensor]) -> bool:
    """Whether float32 sums are as good as the result can show."""
    return table.single and all(x.dtype != torch.float32 for x in out)


def gramian(
    tensors: Sequence[Tensor],
    sets: int,
    scope: int = 0,
    groups: Sequence[int] = (),
    gramians: Callable[[Table], Tensor] = gramians_of,
) -> Tensor:
    """The raw operator `gramian`. Copies are made only where tensors at one place differ in their order."""
    count = len(tensors) // sets
    lists = made_dense([tensors[k * count : (k + 1) * count] for k in range(sets)], indexed=scope == ROW)
    found = gramians(table_of(lists, scope, groups))
    return found if scope else found[0]


def combine_(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    weights: Tensor,
    scope: int = 0,
    groups: Sequence[int] = (),
    combine: Combine = combine_table,
) -> None:
    """The raw operator `combine_`."""
    if not out:
        return
    refuse_overlap(out, tensors)
    sets = [tensors[at : at + len(out)] for at in range(0, len(tensors), len(out))]
    made = made_dense([out, *sets], indexed=scope == ROW)
    table = table_of(made, scope, groups)
    combine(table, 1, weights.contiguous(), single_is_enough(table, out), False)
    copy_back(out, made[0])


TABLE_TYPES: Final = {
    "addresses": "i64", "codes": "i32", "positions": "i32", "starts": "i64", "stops": "i64", "segments": "i32",
}  # fmt: skip


def _case(kernel: Any, lists: int, types: int, acc: tl.dtype, aligned: bool = True, **more: Any) -> AotCase:
    gram = kernel is gramian_kernel
    lanes = 4096 // max(2, triton.next_power_of_2(lists)) if gram else _lanes(types)
    constants = {
        "LISTS": lists,
        **blocks(lists, lanes),
        "TYPES": types,
        "ACC": acc,
        "ALIGNED": aligned,
        **more,
    }
    return AotCase(kernel, {**TABLE_TYPES, "parts" if gram else "weights": "fp64"}, constants)


AOT: Final = (
    *(_case(gramian_kernel, lists, types, tl.float32) for lists in (2, 4, 8) for types in (1, 4)),
    _case(gramian_kernel, 2, 15, tl.float64, aligned=False),
    _case(combine_kernel, 2, 1, tl.float64, FIRST=0, SPARING=True),
    _case(combine_kernel, 2, 4, tl.float32, FIRST=0, SPARING=True),
    _case(combine_kernel, 2, 4, tl.float32, aligned=False, FIRST=0, SPARING=True),
    _case(combine_kernel, 4, 15, tl.float64, aligned=False, FIRST=1, SPARING=False),
    AotCase(segment_sums_kernel, {"parts": "fp64", "firsts": "i64", "out": "fp64"}, {"BLOCK": 1024}),
)

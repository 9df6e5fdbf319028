"""Gramian and weighted sum over lists of tensors: one launch a pass, over a table of addresses.

Program = a chunk of one position (the tensors at one place of every list, dense in one order). Addresses
and element types come from tables, so that lists of any mix of dtypes need no launch of their own. Partial
Gramians are float64 and added in the order of the chunks; weights never leave the device.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, program, span, sum_parts

CHUNK: Final = 16384
# Element types by the code that stands for them in the table; the kernels' flags have one bit for each.
_CODES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


@triton.jit
def choose(base, code, at, inside, x, CODE: tl.constexpr, DTYPE: tl.constexpr):
    """`x` with the rows of that code replaced by their elements."""
    mine = (code == CODE)[:, None]
    pointers = base.to(tl.pointer_type(DTYPE))[:, None] + at[None, :]
    return tl.where(mine, tl.load(pointers, mask=mine & inside[None, :], other=0.0).to(x.dtype), x)


@triton.jit
def load_rows(
    base, code, at, inside, TYPES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """Elements `at` of each list, (ROWS, BLOCK); 0 outside and in the rows that pad the lists."""
    x = tl.zeros((ROWS, BLOCK), dtype=ACC)
    if TYPES & 1:
        x = choose(base, code, at, inside, x, 0, tl.float32)
    if TYPES & 2:
        x = choose(base, code, at, inside, x, 1, tl.float64)
    if TYPES & 4:
        x = choose(base, code, at, inside, x, 2, tl.bfloat16)
    if TYPES & 8:
        x = choose(base, code, at, inside, x, 3, tl.float16)
    return x


@triton.jit
def store_row(base, code, at, inside, x, TYPES: tl.constexpr):
    """Stores one row in the type of its memory."""
    if TYPES & 1:
        tl.store(base.to(tl.pointer_type(tl.float32)) + at, x.to(tl.float32), mask=inside & (code == 0))
    if TYPES & 2:
        tl.store(base.to(tl.pointer_type(tl.float64)) + at, x.to(tl.float64), mask=inside & (code == 1))
    if TYPES & 4:
        tl.store(
            base.to(tl.pointer_type(tl.bfloat16)) + at,
            x.to(tl.float32).to(tl.bfloat16),
            mask=inside & (code == 2),
        )
    if TYPES & 8:
        tl.store(
            base.to(tl.pointer_type(tl.float16)) + at,
            x.to(tl.float32).to(tl.float16),
            mask=inside & (code == 3),
        )


@triton.jit
def chunk_gramian(
    base, code, start, size, TYPES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """(ROWS, ROWS) float64 inner products over one chunk, in lanes of ACC."""
    lanes = tl.zeros((ROWS, ROWS, BLOCK), dtype=ACC)
    for offset in range(0, tl.minimum(size - start, SIZE), BLOCK):
        at = span(start + offset, BLOCK)
        x = load_rows(base, code, at, at < size, TYPES, ROWS, BLOCK, ACC)
        lanes += x[:, None, :] * x[None, :, :]
    return tl.sum(lanes.to(tl.float64), axis=2)


@triton.jit
def gramian_kernel(
    addresses, codes, sizes, positions, starts, parts, count, tasks, LISTS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[a, b, task] = <g_a, g_b> over the chunk. Again in float64 where squares leave float32's range."""
    task = program(0)
    position = tl.load(positions + task).to(tl.int64)
    start, size = tl.load(starts + task).to(tl.int64), tl.load(sizes + position).to(tl.int64)
    row = tl.arange(0, ROWS).to(tl.int64)
    base = tl.load(addresses + row * count + position, mask=row < LISTS, other=0).to(tl.int64)
    code = tl.load(codes + row * count + position, mask=row < LISTS, other=-1).to(tl.int32)
    sums = chunk_gramian(base, code, start, size, TYPES, ROWS, BLOCK, SIZE, ACC)
    if tl.float32 == ACC:
        diagonal = (row[:, None] == row[None, :]) & (row < LISTS)[:, None]
        in_range = (sums >= 1e-24) & (sums <= 1e36)
        outside = tl.sum((diagonal & (in_range == 0)).to(tl.int32).reshape(ROWS * ROWS), axis=0)
        if outside > 0:
            sums = chunk_gramian(base, code, start, size, TYPES, ROWS, BLOCK, SIZE, tl.float64)
    at = parts + (row[:, None] * LISTS + row[None, :]) * tasks + task
    tl.store(at, sums, mask=(row < LISTS)[:, None] & (row < LISTS)[None, :])


@triton.jit
def agem_kernel(gramian, weights):
    """Weights (1, -min(0, <f, r>) / |r|^2); 0 for a retain gradient of zero; a NaN passes."""
    dot, square = tl.load(gramian + 1).to(tl.float64), tl.load(gramian + 3).to(tl.float64)
    conflict = ((dot >= 0) == 0) & (square != 0)
    tl.store(weights, 1.0)
    tl.store(weights + 1, tl.where(conflict, -dot / tl.where(square == 0, 1.0, square), 0.0))


@triton.jit
def combine_kernel(
    addresses, codes, sizes, positions, starts, weights, count, FIRST: tl.constexpr, LISTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr,
    PROJECT: tl.constexpr,
):  # fmt: skip
    """List 0 = sum of weights[k] * list (FIRST + k) over the chunk. PROJECT: not where weights[1] is 0."""
    wanted = True
    if PROJECT:
        wanted = tl.load(weights + 1).to(tl.float64) != 0
    if wanted:
        task = program(0)
        position = tl.load(positions + task).to(tl.int64)
        start, size = tl.load(starts + task).to(tl.int64), tl.load(sizes + position).to(tl.int64)
        row = tl.arange(0, ROWS).to(tl.int64)
        base = tl.load(addresses + (FIRST + row) * count + position, mask=row < LISTS, other=0).to(tl.int64)
        code = tl.load(codes + (FIRST + row) * count + position, mask=row < LISTS, other=-1).to(tl.int32)
        w = tl.load(weights + row, mask=row < LISTS, other=0.0).to(ACC)
        out, out_code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
        for offset in range(0, tl.minimum(size - start, SIZE), BLOCK):
            at = span(start + offset, BLOCK)
            x = load_rows(base, code, at, at < size, TYPES, ROWS, BLOCK, ACC)
            store_row(out, out_code, at, at < size, tl.sum(x * w[:, None], axis=0), TYPES)


class Table(NamedTuple):
    """Lists of tensors as the kernels see them, on their device."""

    addresses: Tensor  # (lists, positions) int64
    codes: Tensor  # (lists, positions) int32
    sizes: Tensor  # (positions,) int64
    positions: Tensor  # (tasks,) int32
    starts: Tensor  # (tasks,) int64
    types: int
    single: bool  # every element type is narrower than float64
    memory: Sequence[Sequence[Tensor]]  # what the addresses point to, kept alive

    @property
    def lists(self) -> int:
        """How many."""
        return self.addresses.shape[0]

    @property
    def tasks(self) -> int:
        """How many chunks."""
        return self.positions.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """What both kernels take first."""
        return self.addresses, self.codes, self.sizes, self.positions, self.starts


def _table(lists: Sequence[Sequence[Tensor]]) -> Table:
    """The table of lists whose tensors are dense in one order at each position."""
    device = lists[0][0].device
    sizes = torch.tensor([x.numel() for x in lists[0]])
    chunks = (sizes + CHUNK - 1) // CHUNK
    positions = torch.repeat_interleave(torch.arange(len(sizes)), chunks)
    first = torch.cumsum(chunks, 0) - chunks
    starts = (torch.arange(len(positions)) - first[positions]) * CHUNK
    codes = [[_CODES[x.dtype] for x in tensors] for tensors in lists]
    types = {code for row in codes for code in row}
    addresses = torch.tensor([[x.data_ptr() for x in tensors] for tensors in lists])
    return Table(
        addresses.to(device, non_blocking=True),
        torch.tensor(codes, dtype=torch.int32).to(device, non_blocking=True),
        sizes.to(device, non_blocking=True),
        positions.to(device, torch.int32, non_blocking=True),
        starts.to(device, non_blocking=True),
        types=sum(1 << code for code in types),
        single=_CODES[torch.float64] not in types,
        memory=lists,
    )


def _dense_together(tensors: Sequence[Tensor]) -> bool:
    first = tensors[0]
    if all(x.is_contiguous() for x in tensors):
        return True
    return all(x.stride() == first.stride() for x in tensors) and torch.ops.aten.is_non_overlapping_and_dense(
        first
    )


def _made_dense(lists: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """The lists with contiguous copies where the tensors at a position differ in their order."""
    places = [
        list(xs) if _dense_together(xs) else [x.contiguous() for x in xs] for xs in zip(*lists, strict=True)
    ]
    return [list(tensors) for tensors in zip(*places, strict=True)]


def _copy_back(to: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    for x, y in zip(to, made, strict=True):
        if x.data_ptr() != y.data_ptr():
            x.copy_(y)


def _refuse_overlap(out: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    if _ops.raw("find_clash")(list(out), list(tensors))[0] >= 0:
        raise RuntimeError("a tensor that is written overlaps in memory with another one")


def _blocks(lists: int, lanes: int) -> dict[str, int]:
    rows = max(2, triton.next_power_of_2(lists))
    return {"ROWS": rows, "BLOCK": max(16, min(1024, lanes // rows)), "SIZE": CHUNK}


def _lanes(types: int) -> int:
    """Lanes of a combination: fewer where each element type takes registers of its own."""
    return 4096 if types.bit_count() == 1 else 2048


def _gramian(table: Table) -> Tensor:
    lists, device = table.lists, table.addresses.device
    parts = torch.empty(lists * lists, table.tasks, dtype=torch.float64, device=device)
    if table.tasks > 0:
        blocks = _blocks(lists, 4096 // max(2, triton.next_power_of_2(lists)))
        acc = tl.float32 if table.single else tl.float64
        with on_device(parts):
            gramian_kernel[(table.tasks,)](
                *table.tensors(), parts, table.addresses.shape[1], table.tasks, LISTS=lists, **blocks,
                TYPES=table.types, ACC=acc, **launch_options(),
            )  # fmt: skip
    return sum_parts(parts, torch.float64).view(lists, lists)


def _combine(table: Table, first: int, weights: Tensor, *, single: bool, project: bool) -> None:
    if table.tasks == 0:
        return
    lists, acc = table.lists - first, tl.float32 if single else tl.float64
    with on_device(weights):
        combine_kernel[(table.tasks,)](
            *table.tensors(), weights, table.addresses.shape[1], FIRST=first, LISTS=lists,
            **_blocks(lists, _lanes(table.types)), TYPES=table.types, ACC=acc, PROJECT=project,
            **launch_options(),
        )  # fmt: skip


def _single(table: Table, out: Sequence[Tensor]) -> bool:
    """Whether float32 sums are as good as the result can show."""
    return table.single and all(x.dtype != torch.float32 for x in out)


def gramian(tensors: Sequence[Tensor], sets: int) -> Tensor:
    """The raw operator `gramian`. Copies are made only where tensors at one place differ in their order."""
    count = len(tensors) // sets
    return _gramian(_table(_made_dense([tensors[k * count : (k + 1) * count] for k in range(sets)])))


def combine_(out: Sequence[Tensor], tensors: Sequence[Tensor], weights: Tensor) -> None:
    """The raw operator `combine_`."""
    if not out:
        return
    _refuse_overlap(out, tensors)
    sets = [tensors[at : at + len(out)] for at in range(0, len(tensors), len(out))]
    made = _made_dense([out, *sets])
    table = _table(made)
    _combine(table, 1, weights.contiguous(), single=_single(table, out), project=False)
    _copy_back(out, made[0])


def project_conflict_(forget: Sequence[Tensor], retain: Sequence[Tensor], rule: int) -> tuple[Tensor, Tensor]:
    """The raw operator `project_conflict_`: two passes and no wait for the device."""
    _refuse_overlap(forget, retain)
    made = _made_dense([forget, retain])
    table = _table(made)
    G = _gramian(table)
    weights = torch.empty(2, dtype=torch.float64, device=G.device)
    with on_device(G):
        agem_kernel[(1,)](G, weights, **launch_options(num_warps=1))
    _combine(table, 0, weights, single=_single(table, forget), project=True)
    _copy_back(forget, made[0])
    return G, weights


def _case(kernel: Any, lists: int, types: int, acc: tl.dtype, **more: Any) -> AotCase:
    pointers = {"addresses": "i64", "codes": "i32", "sizes": "i64", "positions": "i32", "starts": "i64"}
    gram = kernel is gramian_kernel
    lanes = 4096 // max(2, triton.next_power_of_2(lists)) if gram else _lanes(types)
    constants = {"LISTS": lists, **_blocks(lists, lanes), "TYPES": types, "ACC": acc, **more}
    return AotCase(kernel, {**pointers, "parts" if gram else "weights": "fp64"}, constants)


AOT: Final = (
    *(_case(gramian_kernel, lists, types, tl.float32) for lists in (2, 4, 8) for types in (1, 4)),
    _case(gramian_kernel, 2, 15, tl.float64),
    _case(combine_kernel, 2, 1, tl.float64, FIRST=0, PROJECT=True),
    _case(combine_kernel, 2, 4, tl.float32, FIRST=0, PROJECT=True),
    _case(combine_kernel, 4, 15, tl.float64, FIRST=1, PROJECT=False),
    AotCase(agem_kernel, {"gramian": "fp64", "weights": "fp64"}, num_warps=1),
)

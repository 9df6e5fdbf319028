"""Inner products over lists of tensors in the metric of Adam, one launch for any mix of types."""

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, program, span
from unlearn_kernels.triton_kernels.surgery.masks import load_one
from unlearn_kernels.triton_kernels.surgery.sums import TABLE_TYPES, blocks, bounds, load_rows, segment_sums
from unlearn_kernels.triton_kernels.surgery.tables import made_dense, table_of


@triton.jit
def metric_chunk(
    base, code, second, second_code, scale, eps, start, stop, TYPES: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """(ROWS, ROWS) float64 sums of a b / (sqrt(scale v) + eps) over one chunk, in lanes of ACC."""
    lanes = tl.zeros((ROWS, ROWS, BLOCK), dtype=ACC)
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        x = load_rows(base, code, at, at < stop, TYPES, ROWS, BLOCK, ACC, ALIGNED)
        v = load_one(second, second_code, at, at < stop, TYPES, ACC, ALIGNED)
        metric = 1.0 / (tl.sqrt(scale.to(ACC) * v) + eps.to(ACC))
        metric = tl.where(at < stop, metric, 0.0)
        lanes += (x * metric[None, :])[:, None, :] * x[None, :, :]
    return tl.sum(lanes.to(tl.float64), axis=2)


@triton.jit
def metric_kernel(
    addresses, codes, positions, starts, stops, segments, scales, parts, eps, count, tasks, LISTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """parts[a, b, task]. Again in float64 where squares leave float32's range. The list behind the others is v."""
    task = program(0)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    row = tl.arange(0, ROWS).to(tl.int64)
    base = tl.load(addresses + row * count + position, mask=row < LISTS, other=0).to(tl.int64)
    code = tl.load(codes + row * count + position, mask=row < LISTS, other=-1).to(tl.int32)
    second = tl.load(addresses + LISTS * count + position).to(tl.int64)
    second_code = tl.load(codes + LISTS * count + position).to(tl.int32)
    scale, e = tl.load(scales + position).to(tl.float64), tl.load(eps).to(tl.float64)
    sums = metric_chunk(
        base, code, second, second_code, scale, e, start, stop, TYPES, ROWS, BLOCK, ACC, ALIGNED
    )
    if tl.float32 == ACC:
        diagonal = (row[:, None] == row[None, :]) & (row < LISTS)[:, None]
        in_range = (sums >= 1e-24) & (sums <= 1e36)
        outside = tl.sum((diagonal & (in_range == 0)).to(tl.int32).reshape(ROWS * ROWS), axis=0)
        if outside > 0:
            sums = metric_chunk(
                base, code, second, second_code, scale, e, start, stop, TYPES, ROWS, BLOCK, tl.float64, ALIGNED
            )  # fmt: skip
    at = parts + (row[:, None] * LISTS + row[None, :]) * tasks + task
    tl.store(at, sums, mask=(row < LISTS)[:, None] & (row < LISTS)[None, :])


def _blocks(sets: int) -> dict[str, int]:
    return blocks(sets, 4096 // max(2, triton.next_power_of_2(sets)))


def weighted_gramian(
    tensors: Sequence[Tensor], sets: int, seconds: Sequence[Tensor], scales: Tensor, eps: float
) -> Tensor:
    """The raw operator `weighted_gramian`. Copies are made only where tensors at one place differ in their order."""
    n = len(seconds)
    made = made_dense([*(tensors[k * n : (k + 1) * n] for k in range(sets)), seconds])
    table = table_of(made)
    parts = torch.empty(sets * sets, table.tasks, dtype=torch.float64, device=scales.device)
    if table.tasks > 0:
        acc = tl.float32 if table.single else tl.float64
        with on_device(parts):
            metric_kernel[(table.tasks,)](
                *table.tensors(), scales.contiguous(), parts, scales.new_full((1,), eps), n, table.tasks,
                LISTS=sets, **_blocks(sets), TYPES=table.types, ACC=acc, ALIGNED=table.aligned, **launch_options(),
            )  # fmt: skip
    return segment_sums(parts, table).view(sets, sets)


def _case(sets: int, types: int, acc: tl.dtype, aligned: bool = True) -> AotCase:
    shape = {"LISTS": sets, **_blocks(sets)}
    constants: dict[str, Any] = {**shape, "TYPES": types, "ACC": acc, "ALIGNED": aligned}
    pointers = {**TABLE_TYPES, "scales": "fp64", "parts": "fp64", "eps": "fp64"}
    return AotCase(metric_kernel, pointers, constants)


AOT: Final = (
    _case(2, 1, tl.float32),
    _case(9, 1, tl.float32),
    _case(2, 4, tl.float32),
    _case(2, 15, tl.float64, aligned=False),
)

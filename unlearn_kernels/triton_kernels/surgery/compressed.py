"""Blocks of 256 elements as int8 codes with a scale, and a projection that reads them as they are."""

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, program, span
from unlearn_kernels.triton_kernels.surgery.masks import load_one
from unlearn_kernels.triton_kernels.surgery.sums import TABLE_TYPES, bounds, segment_sums, store_row
from unlearn_kernels.triton_kernels.surgery.tables import (
    Table,
    addresses_of,
    copy_back,
    refuse_overlap,
    table_of,
)

_BLOCK: Final = 256  # elements that share a scale
_TILE: Final = 4  # such blocks at once


@triton.jit
def place_of(addresses, codes, positions, starts, stops, ALIGNED: tl.constexpr):
    """Position, bounds, address and element type of the program's chunk."""
    task = program(0)
    position = tl.load(positions + task).to(tl.int64)
    start, stop = bounds(starts, stops, task, ALIGNED)
    base, code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
    return position, start, stop, base, code


@triton.jit
def decoded(kept, scales, position, at, inside, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The elements that codes stand for: products in float32."""
    codes = tl.load(kept + position).to(tl.int64).to(tl.pointer_type(tl.int8))
    scale = tl.load(scales + position).to(tl.int64).to(tl.pointer_type(tl.float32))
    code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    return (code * tl.load(scale + at // BLOCK, mask=inside, other=0.0).to(tl.float32)).to(ACC)


@triton.jit
def compress_kernel(
    addresses, codes, positions, starts, stops, segments, kept, scales, BLOCK: tl.constexpr, TYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Codes and scales of one chunk."""
    position, start, stop, base, code = place_of(addresses, codes, positions, starts, stops, ALIGNED)
    out = tl.load(kept + position).to(tl.int64).to(tl.pointer_type(tl.int8))
    scale_out = tl.load(scales + position).to(tl.int64).to(tl.pointer_type(tl.float32))
    for offset in range(0, stop - start, BLOCK):
        at = span(start + offset, BLOCK)
        inside = at < stop
        x = load_one(base, code, at, inside, TYPES, tl.float32, ALIGNED)
        size = tl.abs(x)
        odd = tl.sum((((x - x) == 0) == 0).to(tl.int32), axis=0)
        scale = tl.div_rn(tl.max(tl.where((x - x) == 0, size, 0.0), axis=0), 127.0)
        usable = (odd == 0) & (scale > 0)
        ratio = tl.div_rn(x, tl.zeros_like(x) + tl.where(usable, scale, 1.0))
        ratio = tl.minimum(tl.maximum(ratio, -127.0), 127.0)
        rounded = (ratio + 12582912.0) - 12582912.0
        rounded = tl.where(usable, rounded, 0.0)
        tl.store(out + at, rounded.to(tl.int32).to(tl.int8), mask=inside)
        tl.store(scale_out + (start + offset) // BLOCK, tl.where(odd == 0, scale, float("nan")))


@triton.jit
def decompress_kernel(
    addresses, codes, positions, starts, stops, segments, kept, scales, BLOCK: tl.constexpr, TILE: tl.constexpr,
    TYPES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One chunk of the tensors that the codes stand for."""
    position, start, stop, base, code = place_of(addresses, codes, positions, starts, stops, ALIGNED)
    for offset in range(0, stop - start, BLOCK * TILE):
        at = span(start + offset, BLOCK * TILE)
        x = decoded(kept, scales, position, at, at < stop, BLOCK, tl.float32)
        store_row(base, code, at, at < stop, x, TYPES, ALIGNED)


@triton.jit
def coded_sums(
    base, code, kept, scales, position, start, stop, BLOCK: tl.constexpr, TILE: tl.constexpr, TYPES: tl.constexpr,
    ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """<f, f>, <f, r> and <r, r> over one chunk, float64, in lanes of ACC."""
    ff = tl.zeros((BLOCK * TILE,), dtype=ACC)
    fr = tl.zeros((BLOCK * TILE,), dtype=ACC)
    rr = tl.zeros((BLOCK * TILE,), dtype=ACC)
    for offset in range(0, stop - start, BLOCK * TILE):
        at = span(start + offset, BLOCK * TILE)
        f = load_one(base, code, at, at < stop, TYPES, ACC, ALIGNED)
        r = decoded(kept, scales, position, at, at < stop, BLOCK, ACC)
        ff += f * f
        fr += f * r
        rr += r * r
    return (
        tl.sum(ff.to(tl.float64), axis=0),
        tl.sum(fr.to(tl.float64), axis=0),
        tl.sum(rr.to(tl.float64), axis=0),
    )


@triton.jit
def coded_gramian_kernel(
    addresses, codes, positions, starts, stops, segments, kept, scales, parts, tasks, BLOCK: tl.constexpr,
    TILE: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """parts[(ff, fr, fr, rr), task]. Again in float64 where squares leave float32's range."""
    position, start, stop, base, code = place_of(addresses, codes, positions, starts, stops, ALIGNED)
    ff, fr, rr = coded_sums(base, code, kept, scales, position, start, stop, BLOCK, TILE, TYPES, ACC, ALIGNED)
    if tl.float32 == ACC:
        in_range = (ff >= 1e-24) & (ff <= 1e36) & (rr >= 1e-24) & (rr <= 1e36)
        if in_range == 0:
            ff, fr, rr = coded_sums(
                base, code, kept, scales, position, start, stop, BLOCK, TILE, TYPES, tl.float64, ALIGNED
            )
    task = program(0)
    tl.store(parts + task, ff)
    tl.store(parts + tasks + task, fr)
    tl.store(parts + 2 * tasks + task, fr)
    tl.store(parts + 3 * tasks + task, rr)


@triton.jit
def coded_weights_kernel(gramian, weights):
    """Weights (1, -min(0, <f, r>) / |r|^2); 0 for a retain gradient of zero; a NaN passes."""
    dot, square = tl.load(gramian + 1).to(tl.float64), tl.load(gramian + 3).to(tl.float64)
    conflict = ((dot >= 0) == 0) & (square != 0)
    tl.store(weights, 1.0)
    tl.store(weights + 1, tl.where(conflict, -dot / tl.where(square == 0, 1.0, square), 0.0))


@triton.jit
def coded_add_kernel(
    addresses, codes, positions, starts, stops, segments, kept, scales, weights, BLOCK: tl.constexpr,
    TILE: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """f += weights[1] r; nothing where that is 0."""
    w = tl.load(weights + 1).to(tl.float64)
    if w != 0:
        position, start, stop, base, code = place_of(addresses, codes, positions, starts, stops, ALIGNED)
        for offset in range(0, stop - start, BLOCK * TILE):
            at = span(start + offset, BLOCK * TILE)
            f = load_one(base, code, at, at < stop, TYPES, ACC, ALIGNED)
            r = decoded(kept, scales, position, at, at < stop, BLOCK, ACC)
            store_row(base, code, at, at < stop, f + w.to(ACC) * r, TYPES, ALIGNED)


def _launch(
    kernel: Any, table: Table, codes: Sequence[Tensor], scales: Sequence[Tensor], *more: Any, **constants: Any
) -> None:
    device = table.addresses.device
    with on_device(table.addresses):
        kernel[(table.tasks,)](
            *table.tensors(), addresses_of(codes, device), addresses_of(scales, device), *more, BLOCK=_BLOCK,
            TYPES=table.types, ALIGNED=table.aligned, **constants, **launch_options(),
        )  # fmt: skip


def compress(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The raw operator `compress`."""
    codes = [x.new_empty(x.shape, dtype=torch.int8) for x in tensors]
    scales = [x.new_empty((x.numel() + _BLOCK - 1) // _BLOCK, dtype=torch.float32) for x in tensors]
    table = table_of([[x.contiguous() for x in tensors]])
    if table.tasks > 0:
        _launch(compress_kernel, table, codes, scales)
    return codes, scales


def decompress_(out: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    """The raw operator `decompress_`."""
    refuse_overlap(out, [])
    made = [x.contiguous() for x in out]
    table = table_of([made])
    if table.tasks > 0:
        _launch(decompress_kernel, table, codes, scales, TILE=_TILE)
    copy_back(out, made)


def project_conflict_compressed_(
    forget: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """The raw operator `project_conflict_compressed_`: two passes and no wait for the device."""
    refuse_overlap(forget, [])
    made = [x.contiguous() for x in forget]
    table, device = table_of([made]), forget[0].device
    parts = torch.empty(4, table.tasks, dtype=torch.float64, device=device)
    if table.tasks > 0:
        acc = tl.float32 if table.single else tl.float64
        _launch(coded_gramian_kernel, table, codes, scales, parts, table.tasks, TILE=_TILE, ACC=acc)
    G = segment_sums(parts, table).view(2, 2)
    weights = torch.empty(2, dtype=torch.float64, device=device)
    with on_device(G):
        coded_weights_kernel[(1,)](G, weights, **launch_options(num_warps=1))
    if table.tasks > 0:
        narrow = table.single and all(x.dtype != torch.float32 for x in forget)
        acc = tl.float32 if narrow else tl.float64
        _launch(coded_add_kernel, table, codes, scales, weights, TILE=_TILE, ACC=acc)
    copy_back(forget, made)
    return G, weights


_KEPT: Final = {**TABLE_TYPES, "kept": "i64", "scales": "i64"}


def _case(kernel: Any, types: int, pointers: dict[str, str] | None = None, **more: Any) -> AotCase:
    constants = {"BLOCK": _BLOCK, "TYPES": types, "ALIGNED": types != 15, **more}
    return AotCase(kernel, {**_KEPT, **(pointers or {})}, constants)


AOT: Final = (
    *(_case(compress_kernel, types) for types in (1, 4, 15)),
    *(_case(decompress_kernel, types, TILE=_TILE) for types in (1, 4, 15)),
    *(
        _case(coded_gramian_kernel, types, {"parts": "fp64"}, TILE=_TILE, ACC=acc)
        for types, acc in ((1, tl.float32), (4, tl.float32), (15, tl.float64))
    ),
    *(
        _case(coded_add_kernel, types, {"weights": "fp64"}, TILE=_TILE, ACC=acc)
        for types, acc in ((1, tl.float64), (4, tl.float32))
    ),
    AotCase(coded_weights_kernel, {"gramian": "fp64", "weights": "fp64"}, num_warps=1),
)

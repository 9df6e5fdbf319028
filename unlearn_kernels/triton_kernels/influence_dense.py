"""Projection by a normal matrix that is made in registers, and the transposes of this and of the matrix of signs."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_dot,
    block_size,
    dot_dtype,
    launch_options,
    load_as,
    on_device,
    program,
    span,
    store_as,
)
from unlearn_kernels.triton_kernels.influence import RUN, Parts
from unlearn_kernels.triton_kernels.influence_random import digit_table, normal_entries, sign_entries

_WARPS: Final = 8  # FMA products with operands in registers
_STAGES: Final = (
    1  # the table of entries stays in the L1 cache: copies ahead of time would only take shared memory
)
_COORDINATES: Final = 128  # that a program of the transpose writes: those of one call for signs


@triton.jit(do_not_specialize=["seed"])
def normal_kernel(
    g, table, parts, batch, dim, outputs, seed, offset, length, g_b, g_d, row_tiles, col_tiles, count,
    ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, j, part] = g[b] times row j of the normal matrix, over `length` coordinates from part * length on."""
    task = program(0)
    part, tile = task // (row_tiles * col_tiles), task % (row_tiles * col_tiles)
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    end = tl.minimum(dim, (part + 1) * length)
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    for start in range(part * length, end, RUN):
        run = tl.zeros((ROWS, COLS), dtype=ACC)
        for at in range(start, tl.minimum(end, start + RUN), 32):
            k = span(tl.to_tensor(at), 32)
            x = load_as(
                g + rows[:, None] * g_b + k[None, :] * g_d, (rows < batch)[:, None] & (k < end)[None, :], ACC
            )
            entries = normal_entries(seed, table, cols, offset + at, 32)
            run = add_dot(run, x, tl.trans(entries).to(ACC))
        acc += run
    inside = (rows < batch)[:, None] & (cols < outputs)[None, :]
    tl.store(parts + (rows[:, None] * outputs + cols[None, :]) * count + part, acc, mask=inside)


def normal_project(g: Tensor, k: int, seed: int, offset: int) -> Tensor:
    """The raw operator: g (B, dim) -> (B, k). The entries have 16 bits, so products are in fp32 (fp64 for fp64).

    Scratch: `parts * B * k` sums, at most 256 parts of at least 8192 coordinates each.
    """
    batch, dim = g.shape
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    if g.numel() == 0 or k == 0:
        return g.new_zeros(batch, k, dtype=dtype)
    split = Parts.of(batch, dim, k)
    parts = torch.empty(batch * k, split.shares, dtype=dtype, device=g.device)
    with on_device(g):
        normal_kernel[(split.programs,)](
            g, digit_table(g.device, dtype), parts, batch, dim, k, seed, offset, split.length, *g.stride(),
            split.row_tiles, split.col_tiles, split.shares, ROWS=split.rows, COLS=split.cols, RUN=RUN,
            ACC=acc_dtype(dot_dtype(g)), **launch_options(_WARPS, _STAGES),
        )  # fmt: skip
    return (parts.sum(1, dtype=torch.float64) / k**0.5).to(dtype).view(batch, k)


@triton.jit(do_not_specialize=["seed"])
def adjoint_kernel(
    y, table, out, batch, outputs, dim, seed, offset, y_b, y_k, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, NORMAL: tl.constexpr,
):  # fmt: skip
    """out[b] = y[b] times the matrix / sqrt(outputs), COLS coordinates of it."""
    task = program(0)
    rows, first = span(task // col_tiles * ROWS, ROWS), task % col_tiles * COLS
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    for start in range(0, outputs, DEPTH):
        j = span(tl.to_tensor(start), DEPTH)
        x = load_as(
            y + rows[:, None] * y_b + j[None, :] * y_k, (rows < batch)[:, None] & (j < outputs)[None, :], DOT
        )
        if NORMAL:
            entries = normal_entries(seed, table, j, offset + first, COLS)
        else:
            entries = sign_entries(seed, j, (offset + first) // COLS)
        acc = add_dot(acc, x, entries.to(DOT))
    scale = 1.0 / tl.sqrt(tl.to_tensor(outputs).to(tl.float64))
    cols = span(first, COLS)
    inside = (rows < batch)[:, None] & (cols < dim)[None, :]
    store_as(out + rows[:, None] * dim + cols[None, :], acc * scale.to(ACC), inside)


def dense_adjoint(y: Tensor, dim: int, seed: int, offset: int, normal: bool) -> Tensor:
    """The raw operator: y (B, k) -> (B, dim). No scratch."""
    batch, k = y.shape
    acc = acc_dtype(dot_dtype(y))
    out = y.new_empty(batch, dim, dtype=torch.float64 if acc == tl.float64 else torch.float32)
    if out.numel() == 0 or k == 0:
        return out.zero_()
    rows, col_tiles = block_size(batch, 64), triton.cdiv(dim, _COORDINATES)
    dot = acc if normal else dot_dtype(y)
    table = digit_table(y.device, out.dtype) if normal else None
    with on_device(y):
        adjoint_kernel[(triton.cdiv(batch, rows) * col_tiles,)](
            y, table, out, batch, k, dim, seed, offset, *y.stride(), col_tiles,
            ROWS=rows, COLS=_COORDINATES, DEPTH=_adjoint_depth(dot), DOT=dot, ACC=acc, NORMAL=normal,
            **launch_options(_WARPS, _STAGES),
        )  # fmt: skip
    return out


def _adjoint_depth(dot: tl.dtype) -> int:
    return 32 if dot.primitive_bitwidth == 16 else 16


def _normal_case(dtype: str, **more: Any) -> AotCase:
    acc = acc_dtype(DTYPES[dtype])
    return AotCase(
        normal_kernel,
        {"g": dtype, "table": str(acc), "parts": str(acc)},
        {"g_d": 1, "ROWS": 32, "COLS": 64, "RUN": RUN, "ACC": acc},
        num_warps=_WARPS,
        num_stages=_STAGES,
        multiples_of_16=("dim", "g_b", "length"),
        **more,
    )


def _adjoint_case(dtype: str, normal: bool, **more: Any) -> AotCase:
    acc = acc_dtype(DTYPES[dtype])
    dot = acc if normal else DTYPES[dtype]
    constants = {"ROWS": 32, "COLS": _COORDINATES, "DEPTH": _adjoint_depth(dot), "DOT": dot, "ACC": acc}
    return AotCase(
        adjoint_kernel,
        {"y": dtype, "out": str(acc)} | ({"table": str(acc)} if normal else {}),
        constants | {"y_k": 1, "NORMAL": normal} | ({} if normal else {"table": None}),
        num_warps=_WARPS,
        num_stages=_STAGES,
        multiples_of_16=("outputs", "dim", "y_b"),
        **more,
    )


AOT: Final = (
    _normal_case("fp32"),
    _normal_case("bf16"),
    _normal_case("fp64", spills=True),
    _adjoint_case("fp32", True),
    _adjoint_case("fp64", True, spills=True),
    _adjoint_case("fp32", False),
    _adjoint_case("bf16", False, tensor_cores=True),
    _adjoint_case("fp16", False, tensor_cores=True),
)

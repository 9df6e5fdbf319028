"""Products of curvature: squared gradients, squared rows, covariances."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_product,
    block_size,
    dot_dtype,
    launch_options,
    load_as,
    on_device,
    program,
    span,
    tile_for,
)

_PROGRAMS: Final = 512  # that fill a GPU
_SCRATCH: Final = 1 << 24  # elements
_RUN: Final = 2048  # rows whose sum is a chain


def _shares(tiles: int, size: int, total: int, least: int) -> tuple[int, int]:
    """(count, length): how `total` terms of a result of `size` elements are shared out to `count` partial results."""
    count = max(1, min(triton.cdiv(_PROGRAMS, tiles), _SCRATCH // max(size, 1), triton.cdiv(total, least)))
    length = max(triton.cdiv(total, count), 1)
    return triton.cdiv(total, length), length


def _joined(parts: Tensor) -> Tensor:
    """The sum of partial results, in one order."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0, dtype=torch.float64).to(parts.dtype)


@triton.jit
def squared_gradients_kernel(
    a, g, parts, batch, tokens, inputs, outputs, length, a_b, a_t, a_d, g_b, g_t, g_p, row_tiles, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[part] = a tile of the sum of (G_b^T A_b)^2 over `length` samples; a gradient is never in memory."""
    task = program(0)
    part, tile = task // (row_tiles * col_tiles), task % (row_tiles * col_tiles)
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    squares = tl.zeros((ROWS, COLS), dtype=ACC)
    for b in range(part * length, tl.minimum(batch, (part + 1) * length)):
        acc = tl.zeros((ROWS, COLS), dtype=ACC)
        acc = add_product(
            acc, g + b * g_b, g_p, g_t, rows, outputs, a + b * a_b, a_d, a_t, cols, inputs, tokens, DEPTH, DOT
        )
        squares += acc * acc
    inside = (rows < outputs)[:, None] & (cols < inputs)[None, :]
    tl.store(parts + (part * outputs + rows[:, None]) * inputs + cols[None, :], squares, mask=inside)


def squared_gradients(a: Tensor, g: Tensor) -> Tensor:
    """The raw operator: a (B, T, d), g (B, T, p) -> (p, d). Scratch: at most 64 MB (fp64: 128), and a result."""
    (batch, tokens, inputs), outputs = a.shape, g.shape[2]
    dot = dot_dtype(a, g)
    dtype = torch.float64 if dot == tl.float64 else torch.float32
    if a.numel() == 0 or g.numel() == 0:
        return a.new_zeros(outputs, inputs, dtype=dtype)
    tile = tile_for(outputs, inputs, tokens, dot, accumulators=2)
    row_tiles, col_tiles = triton.cdiv(outputs, tile.rows), triton.cdiv(inputs, tile.cols)
    count, length = _shares(row_tiles * col_tiles, outputs * inputs, batch, 1)
    parts = a.new_empty(count, outputs, inputs, dtype=dtype)
    with on_device(a):
        squared_gradients_kernel[(count * row_tiles * col_tiles,)](
            a, g, parts, batch, tokens, inputs, outputs, length, *a.stride(), *g.stride(), row_tiles, col_tiles,
            ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, DOT=dot, ACC=acc_dtype(dot), **tile.launch(),
        )  # fmt: skip
    return _joined(parts)


@triton.jit
def squared_rows_kernel(
    x, parts, batch, dim, length, x_b, x_d, tiles, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):
    """parts[part, i] = sum of x[b, i]^2 over `length` rows."""
    task = program(0)
    part, cols = task // tiles, span(task % tiles * COLS, COLS)
    end = tl.minimum(batch, (part + 1) * length)
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    for start in range(part * length, end, ROWS):
        rows = span(tl.to_tensor(start), ROWS)
        value = load_as(
            x + rows[:, None] * x_b + cols[None, :] * x_d, (rows < end)[:, None] & (cols < dim)[None, :], ACC
        )
        acc += value * value
    tl.store(parts + part * dim + cols, tl.sum(acc, axis=0), mask=cols < dim)


def squared_rows(x: Tensor) -> Tensor:
    """The raw operator: x (B, d) -> (d,). Scratch: at most 64 MB (twice for float64), and a result."""
    batch, dim = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.numel() == 0:
        return x.new_zeros(dim, dtype=dtype)
    cols = block_size(dim, 256)
    tiles = triton.cdiv(dim, cols)
    count, length = _shares(tiles, dim, batch, 64)
    parts = x.new_empty(count, dim, dtype=dtype)
    with on_device(x):
        squared_rows_kernel[(count * tiles,)](
            x, parts, batch, dim, length, *x.stride(), tiles, ROWS=8, COLS=cols, ACC=acc_dtype(dot_dtype(x)),
            **launch_options(),
        )  # fmt: skip
    return _joined(parts)


@triton.jit
def covariance_kernel(
    x, parts, count, dim, length, x_n, x_d, side, SIZE: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[part] = X^T X over `length` rows: a tile on or above the diagonal, and its mirror image."""
    task = program(0)
    part, tile = task // (side * side), task % (side * side)
    row, col = tile // side * SIZE, tile % side * SIZE
    if row <= col:
        rows, cols = span(row, SIZE), span(col, SIZE)
        end = tl.minimum(count, (part + 1) * length)
        acc = tl.zeros((SIZE, SIZE), dtype=ACC)
        for start in range(part * length, end, RUN):
            at = x + start * x_n
            acc += add_product(
                tl.zeros((SIZE, SIZE), dtype=ACC), at, x_d, x_n, rows, dim, at, x_d, x_n, cols, dim,
                tl.minimum(RUN, end - start), DEPTH, DOT,
            )  # fmt: skip
        parts += part * dim * dim
        upper = (rows[:, None] <= cols[None, :]) & (cols < dim)[None, :]
        # Within a tile 32 bits do: a row of more than 2^24 elements would be one of 2^48.
        i, width = tl.arange(0, SIZE), tl.to_tensor(dim).to(tl.int32)
        tl.store(parts + row * dim + col + (i[:, None] * width + i[None, :]), acc, mask=upper)
        tl.store(parts + col * dim + row + (i[None, :] * width + i[:, None]), acc, mask=upper)


def covariance(x: Tensor) -> Tensor:
    """The raw operator: x (rows, d) -> (d, d). Scratch: at most 64 MB (twice for float64), and a result."""
    rows, dim = x.shape
    dot = dot_dtype(x)
    dtype = torch.float64 if dot == tl.float64 else torch.float32
    if x.numel() == 0:
        return x.new_zeros(dim, dim, dtype=dtype)
    tile = tile_for(dim, dim, rows, dot, accumulators=2)
    side = triton.cdiv(dim, tile.rows)
    count, length = _shares(side * (side + 1) // 2, dim * dim, rows, 256)
    parts = x.new_empty(count, dim, dim, dtype=dtype)
    with on_device(x):
        covariance_kernel[(count * side * side,)](
            x, parts, rows, dim, length, *x.stride(), side, SIZE=tile.rows, DEPTH=tile.depth, RUN=_RUN, DOT=dot,
            ACC=acc_dtype(dot), **tile.launch(),
        )  # fmt: skip
    return _joined(parts)


def _product_case(
    kernel: Any, pointers: tuple[str, ...], dtype: str, aligned: tuple[str, ...], **more: Any
) -> AotCase:
    dot = DTYPES[dtype]
    tile = tile_for(1024, 1024, 1024, dot, accumulators=2)
    square = kernel is covariance_kernel
    shape = {"SIZE": tile.rows, "RUN": _RUN} if square else {"ROWS": tile.rows, "COLS": tile.cols}
    strides = {"x_d": 1} if square else {"a_d": 1, "g_p": 1}
    return AotCase(
        kernel,
        {**dict.fromkeys(pointers, dtype), "parts": str(acc_dtype(dot))},
        strides | shape | {"DEPTH": tile.depth, "DOT": dot, "ACC": acc_dtype(dot)},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=aligned,
        spills=dtype == "fp64",
        tensor_cores=dtype in ("bf16", "fp16"),
        **more,
    )


AOT: Final = (
    *(
        _product_case(
            squared_gradients_kernel,
            ("a", "g"),
            dtype,
            ("inputs", "outputs", "a_b", "a_t", "g_b", "g_t", "tokens"),
        )
        for dtype in DTYPES
    ),
    *(_product_case(covariance_kernel, ("x",), dtype, ("dim", "x_n", "length")) for dtype in DTYPES),
    *(
        AotCase(
            squared_rows_kernel,
            {"x": dtype, "parts": str(acc_dtype(DTYPES[dtype]))},
            {"x_d": 1, "ROWS": 8, "COLS": 256, "ACC": acc_dtype(DTYPES[dtype])},
            multiples_of_16=("x_b", "dim"),
        )
        for dtype in ("fp32", "bf16", "fp64")
    ),
)

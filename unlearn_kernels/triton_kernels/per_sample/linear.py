"""Squared norms of per-sample gradients of a linear layer, `W_i = G_i^T A_i`, with no gradient in memory."""

from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    Tile,
    acc_dtype,
    add_product,
    block_size,
    dot_dtype,
    hadamard_sum,
    launch_options,
    load_as,
    on_device,
    program,
    row_sum,
    span,
    square_sum,
    store_as,
    sum_parts,
    sum_parts_kernel,
    tile_for,
    total,
)

# The share of |A|^2 |G|^2 / T under which a Gram sum has lost its digits; the C++ kernels use the same.
_CANCELLATION: Final = 0.05


@triton.jit
def direct_kernel(
    a, g, parts, flags, tokens, inputs, outputs, a_b, a_t, a_d, g_b, g_t, g_p, row_tiles, col_tiles,
    tiles, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    FLAGGED: tl.constexpr,
):  # fmt: skip
    """parts[b, tile] = |tile of G_b^T A_b|^2; tiles from row_tiles * col_tiles on, the bias gradient's."""
    task = program(0)
    sample, tile = task // tiles, task % tiles
    wanted = True
    if FLAGGED:
        wanted = tl.load(flags + sample).to(tl.int32) != 0
    if wanted:
        g += sample * g_b
        row = (tile // col_tiles if tile < row_tiles * col_tiles else tile - row_tiles * col_tiles) * ROWS
        rows = span(row, ROWS)
        if tile < row_tiles * col_tiles:
            cols = span(tile % col_tiles * COLS, COLS)
            acc = tl.zeros((ROWS, COLS), dtype=ACC)
            acc = add_product(
                acc, g, g_p, g_t, rows, outputs, a + sample * a_b, a_d, a_t, cols, inputs, tokens, DEPTH, DOT
            )
            inside = (rows < outputs)[:, None] & (cols < inputs)[None, :]
            tl.store(parts + task, square_sum(tl.where(inside, acc, 0.0)))
        else:
            column = token_sum(g, g_t, g_p, rows, outputs, tokens, DEPTH, ACC)
            tl.store(parts + task, tl.sum(column * column, axis=0))


@triton.jit
def token_sum(g, g_t, g_p, rows, outputs, tokens, DEPTH: tl.constexpr, ACC: tl.constexpr):
    """The sum over the tokens of some outputs' gradients; 0 for rows outside."""
    t = tl.arange(0, DEPTH).to(tl.int64)
    at = g + rows[:, None] * g_p + t[None, :] * g_t
    acc = tl.zeros((rows.shape[0], DEPTH), dtype=ACC)
    for start in range(0, tokens, DEPTH):
        acc += load_as(at, (rows < outputs)[:, None] & (t < tokens - start)[None, :], ACC)
        at += DEPTH * g_t
    return tl.sum(acc, axis=1)


@triton.jit
def gram_kernel(
    a, g, parts, a_traces, g_traces, tokens, inputs, outputs, a_b, a_t, a_d, g_b, g_t, g_p, side, tiles,
    BIAS: tl.constexpr, SIZE: tl.constexpr, DEPTH: tl.constexpr, DOT_A: tl.constexpr, DOT_G: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, tile] = sum over a tile of (A A^T + bias) * (G G^T), doubled off the diagonal.

    The side (side + 1) / 2 tiles on and above the diagonal are the cells of a rectangle: its rows hold the
    upper rows of the triangle, and what those leave free holds the lower ones, read backwards. Diagonal tiles
    also give the traces, |A|^2 and |G|^2.
    """
    task = program(0)
    sample, tile = task // tiles, task % tiles
    even = 1 - side % 2
    i, j = tile // (side + even), tile % (side + even)
    upper = j >= i + even
    row_tile = tl.where(upper, i, side - even - i)
    col_tile = tl.where(upper, j - even, side - 1 - j)
    a += sample * a_b
    g += sample * g_b
    rows, cols = span(row_tile * SIZE, SIZE), span(col_tile * SIZE, SIZE)
    zeros = tl.zeros((SIZE, SIZE), dtype=ACC)
    gram_a = add_product(zeros, a, a_t, a_d, rows, tokens, a, a_t, a_d, cols, tokens, inputs, DEPTH, DOT_A)
    gram_g = add_product(zeros, g, g_t, g_p, rows, tokens, g, g_t, g_p, cols, tokens, outputs, DEPTH, DOT_G)
    inside = (rows < tokens)[:, None] & (cols < tokens)[None, :]
    gram_a = tl.where(inside, gram_a + BIAS, 0.0)
    gram_g = tl.where(inside, gram_g, 0.0)
    weight = tl.where(row_tile == col_tile, 1.0, 2.0).to(ACC)
    tl.store(parts + task, hadamard_sum(gram_a, gram_g) * weight)
    if row_tile == col_tile:
        diagonal = rows[:, None] == cols[None, :]
        tl.store(a_traces + sample * side + row_tile, total(tl.where(diagonal, gram_a, 0.0)))
        tl.store(g_traces + sample * side + row_tile, total(tl.where(diagonal, gram_g, 0.0)))


@triton.jit
def flag_kernel(norms, a_traces, g_traces, flags, tokens, side, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """flags[b] = 1 where the Gram sum cancels."""
    sample = program(0)
    bound = row_sum(a_traces, sample, side, BLOCK) * row_sum(g_traces, sample, side, BLOCK) * LIMIT
    norm = tl.load(norms + sample).to(tl.float64)
    tl.store(flags + sample, (norm * tokens < bound).to(tl.int32))


@triton.jit
def replace_kernel(parts, flags, norms, count, BLOCK: tl.constexpr):
    """norms[b] = sum of parts[b] where flagged."""
    sample = program(0)
    if tl.load(flags + sample).to(tl.int32) != 0:
        store_as(norms + sample, row_sum(parts, sample, count, BLOCK), True)


@triton.jit
def square_row(x, stride, size, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """The sum of the squares of a vector."""
    acc = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, size, BLOCK):
        column = span(start, BLOCK)
        value = load_as(x + column * stride, column < size, ACC)
        acc += value * value
    return tl.sum(acc, axis=0)


@triton.jit
def rank1_kernel(
    a, g, out, inputs, outputs, a_b, a_d, g_b, g_p, BIAS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """out[b] = (|a_b|^2 + bias) |g_b|^2, for one token a sample."""
    sample = program(0)
    a_square = square_row(a + sample * a_b, a_d, inputs, BLOCK, ACC) + BIAS
    tl.store(out + sample, a_square * square_row(g + sample * g_b, g_p, outputs, BLOCK, ACC))


class _Layer(NamedTuple):
    """What every launch needs of one call."""

    a: Tensor
    g: Tensor
    bias: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Tokens, inputs, outputs."""
        return self.a.shape[1], self.a.shape[2], self.g.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What is accumulated in and returned."""
        return torch.float64 if self.a.dtype == torch.float64 else torch.float32

    def empty(self, *shape: int) -> Tensor:
        return self.a.new_empty(shape, dtype=self.dtype)


def linear_sqnorms(a: Tensor, g: Tensor, bias: bool, method: int) -> Tensor:
    """The raw operator: a (B, T, d), g (B, T, p) -> (B,). Methods: 0 direct, 1 gram, 2 rank1, 3 guarded gram.

    Scratch: 4 B * tiles bytes (8 for float64), where a tile covers up to 128 x 128 of the product.
    """
    layer = _Layer(a, g, bias)
    if 0 in g.shape:
        return layer.empty(a.shape[0]).zero_()
    with on_device(a):
        if method == 2:
            return _rank1(layer)
        if method == 0:
            return sum_parts(_direct_parts(layer, None), layer.dtype)
        return _gram(layer, guarded=method == 3)


def _rank1(layer: _Layer) -> Tensor:
    a, g, bias = layer
    _, inputs, outputs = layer.shape
    out = layer.empty(a.shape[0])
    strides = a.stride(0), a.stride(2), g.stride(0), g.stride(2)
    block, acc = block_size(max(inputs, outputs), 2048), acc_dtype(dot_dtype(a, g))
    rank1_kernel[(a.shape[0],)](a, g, out, inputs, outputs, *strides, bias, block, acc, **launch_options())
    return out


def _direct_parts(layer: _Layer, flags: Tensor | None) -> Tensor:
    """Partial sums (B, tiles); where flags are given, only those of flagged samples are written.

    Those had cancelled, which strains fp32 here too, so that fp32 operands are multiplied in float64. Half
    types are not: Triton 3.7 cannot compile their float64 product.
    """
    a, g, bias = layer
    tokens, inputs, outputs = layer.shape
    single = a.dtype == g.dtype == torch.float32
    dot = tl.float64 if flags is not None and single else dot_dtype(a, g)
    tile = tile_for(outputs, inputs, tokens, dot)
    row_tiles, col_tiles = triton.cdiv(outputs, tile.rows), triton.cdiv(inputs, tile.cols)
    tiles = row_tiles * (col_tiles + bias)
    parts = a.new_empty(a.shape[0], tiles, dtype=torch.float64 if dot == tl.float64 else torch.float32)
    direct_kernel[(parts.numel(),)](
        a, g, parts, flags, tokens, inputs, outputs, *a.stride(), *g.stride(), row_tiles, col_tiles, tiles,
        tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot), flags is not None, **tile.launch(),
    )  # fmt: skip
    return parts


def _gram(layer: _Layer, guarded: bool) -> Tensor:
    a, g, bias = layer
    tokens, inputs, outputs = layer.shape
    dot = dot_dtype(a, g)
    tile = tile_for(tokens, tokens, max(inputs, outputs), dot, accumulators=2)
    side = triton.cdiv(tokens, tile.rows)
    parts = layer.empty(a.shape[0], side * (side + 1) // 2)
    a_traces, g_traces = layer.empty(a.shape[0], side), layer.empty(a.shape[0], side)
    gram_kernel[(parts.numel(),)](
        a, g, parts, a_traces, g_traces, tokens, inputs, outputs, *a.stride(), *g.stride(), side,
        parts.shape[1], bias, tile.rows, tile.depth, dot_dtype(a), dot_dtype(g), acc_dtype(dot),
        **tile.launch(),
    )  # fmt: skip
    norms = sum_parts(parts, layer.dtype)
    if guarded:
        _redo_cancelled(layer, norms, a_traces, g_traces)
    return norms


def _redo_cancelled(layer: _Layer, norms: Tensor, a_traces: Tensor, g_traces: Tensor) -> None:
    """Overwrites norms that cancelled with direct ones. The device decides which: the host never waits."""
    batch, side = a_traces.shape
    flags = layer.a.new_empty(batch, dtype=torch.int32)
    options = launch_options()
    block, tokens = block_size(side, 1024), layer.shape[0]
    flag_kernel[(batch,)](norms, a_traces, g_traces, flags, tokens, side, _CANCELLATION, block, **options)
    parts = _direct_parts(layer, flags)
    replace_kernel[(batch,)](parts, flags, norms, parts.shape[1], block_size(parts.shape[1], 1024), **options)


_LAYER: Final = ("a_b", "a_t", "g_b", "g_t", "tokens", "inputs", "outputs")


def _case(kernel: Any, dtype: str, tile: Tile, outputs: tuple[str, ...], **constants: Any) -> AotCase:
    """A product of contiguous, aligned operands of one type, at the tile of a large layer."""
    acc = acc_dtype(DTYPES[dtype])
    pointers = {"a": dtype, "g": dtype, **dict.fromkeys(outputs, str(acc))}
    constants = {"a_d": 1, "g_p": 1, "DEPTH": tile.depth, "ACC": acc, **constants}
    return AotCase(
        kernel,
        pointers,
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=_LAYER,
        tensor_cores=dtype == "bf16",
    )


def _product_cases(dtype: str) -> tuple[AotCase, AotCase]:
    dot = DTYPES[dtype]
    tile, square = tile_for(1024, 1024, 512, dot), tile_for(512, 512, 1024, dot, accumulators=2)
    blocks = {"ROWS": tile.rows, "COLS": tile.cols, "DOT": dot, "FLAGGED": False, "flags": None}
    direct = _case(direct_kernel, dtype, tile, ("parts",), **blocks)
    blocks = {"BIAS": True, "SIZE": square.rows, "DOT_A": dot, "DOT_G": dot}
    return direct, _case(gram_kernel, dtype, square, ("parts", "a_traces", "g_traces"), **blocks)


def _redo_case() -> AotCase:
    """The float64 pass that follows a guarded Gram in fp32."""
    tile = tile_for(1024, 1024, 512, tl.float64)
    blocks = {"ROWS": tile.rows, "COLS": tile.cols, "DOT": tl.float64, "ACC": tl.float64, "FLAGGED": True}
    case = _case(direct_kernel, "fp32", tile, (), **blocks)
    return replace(case, pointers={**case.pointers, "parts": "fp64", "flags": "i32"})


_BLOCK: Final = {"BLOCK": 1024}
AOT: Final = (
    *(case for dtype in ("fp32", "bf16", "fp64") for case in _product_cases(dtype)),
    _redo_case(),
    AotCase(
        rank1_kernel, {"a": "bf16", "g": "bf16", "out": "fp32"}, {"BIAS": True, "ACC": tl.float32, **_BLOCK}
    ),
    AotCase(
        flag_kernel,
        {"norms": "fp32", "a_traces": "fp32", "g_traces": "fp32", "flags": "i32"},
        {"LIMIT": _CANCELLATION, **_BLOCK},
    ),
    AotCase(replace_kernel, {"parts": "fp64", "flags": "i32", "norms": "fp32"}, _BLOCK),
    AotCase(sum_parts_kernel, {"parts": "fp32", "out": "fp32"}, _BLOCK),
)

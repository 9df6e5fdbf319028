"""Per-sample gradients of a convolution, `W_i = G_i^T U_i`, with no unfolded input in memory.

An element of `U_i` lies at the sum of an offset of its position and one of its column: two short tables, from which
a block of pointers is made while it is loaded. Each group's gradient is cut into tiles, as in a linear layer.
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    Tile,
    acc_dtype,
    add_dot,
    dot_dtype,
    hadamard_sum,
    load_as,
    on_device,
    program,
    span,
    square_sum,
    store_as,
    sum_parts,
    tile_for,
)

_MOST_BYTES: Final = 64 << 20  # of the second batch's gradients at a time


@triton.jit
def offset(table, row, size, index):
    """`table[row, index]` of a (rows, size) table; 0 beyond its size."""
    return tl.load(table + row * size + index, mask=index < size, other=0).to(tl.int64)


@triton.jit
def place(table, row, size, index):
    """The same for what a dimension bounds: half the registers."""
    return tl.load(table + row * size + index, mask=index < size, other=0).to(tl.int32)


@triton.jit
def within(index, size):
    """Whether an index lies inside of a dimension."""
    return (index >= 0) & (index < size)


@triton.jit
def add_window_product(
    acc, a, g, positions, columns, count, rows, outputs, cols, inputs, deep, high, wide, g_c,
    DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`acc + G[:, rows]^T U[:, cols]` of one sample and group, summed over its positions.

    `positions` holds rows of offsets in A, offsets in G, and the window's z, y, x; `columns` offsets in A and shifts
    of z, y, x.
    """
    at = offset(columns, 0, inputs, cols)
    z, y, x = (
        place(columns, 1, inputs, cols),
        place(columns, 2, inputs, cols),
        place(columns, 3, inputs, cols),
    )
    for start in range(0, count, DEPTH):
        t = span(start, DEPTH)
        upstream = load_as(
            g + rows[:, None] * g_c + offset(positions, 1, count, t)[None, :],
            (rows < outputs)[:, None] & (t < count)[None, :],
            DOT,
        )
        inside = (t < count)[:, None] & (cols < inputs)[None, :]
        inside &= within(place(positions, 2, count, t)[:, None] + z[None, :], deep)
        inside &= within(place(positions, 3, count, t)[:, None] + y[None, :], high)
        inside &= within(place(positions, 4, count, t)[:, None] + x[None, :], wide)
        unfolded = load_as(a + offset(positions, 0, count, t)[:, None] + at[None, :], inside, DOT)
        acc = add_dot(acc, upstream, unfolded)
    return acc


@triton.jit
def conv_norms_kernel(
    a, g, parts, positions, columns, count, outputs, inputs, deep, high, wide, a_b, a_group, g_b, g_c, groups,
    tiles, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, group, tile] = |tile of the gradient|^2."""
    task = program(0)
    sample, group, tile = task // tiles // groups, task // tiles % groups, task % tiles
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    acc = add_window_product(
        tl.zeros((ROWS, COLS), dtype=ACC), a + sample * a_b + group * a_group,
        g + sample * g_b + group * outputs * g_c, positions, columns, count, rows, outputs, cols, inputs,
        deep, high, wide, g_c, DEPTH, DOT,
    )  # fmt: skip
    inside = (rows < outputs)[:, None] & (cols < inputs)[None, :]
    tl.store(parts + task, square_sum(tl.where(inside, acc, 0.0)))


@triton.jit
def conv_gradients_kernel(
    a, g, w, out, batch, positions, columns, count, outputs, inputs, deep, high, wide, a_b, a_group, g_b, g_c,
    groups, tiles, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """out[b, group, row, column] = the gradient, or without the b the sum of w[b] times it."""
    task = program(0)
    first, group, tile = task // tiles // groups, task // tiles % groups, task % tiles
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    zeros = tl.zeros((ROWS, COLS), dtype=ACC)
    a += group * a_group
    g += group * outputs * g_c
    if SUMMED:
        total = zeros
        for sample in range(0, batch):
            acc = add_window_product(
                zeros, a + sample * a_b, g + sample * g_b, positions, columns, count, rows, outputs, cols,
                inputs, deep, high, wide, g_c, DEPTH, DOT,
            )  # fmt: skip
            total += acc * tl.load(w + sample).to(ACC)
    else:
        total = add_window_product(
            zeros, a + first * a_b, g + first * g_b, positions, columns, count, rows, outputs, cols,
            inputs, deep, high, wide, g_c, DEPTH, DOT,
        )  # fmt: skip
    at = out + ((first * groups + group) * outputs + rows[:, None]) * inputs + cols[None, :]
    store_as(at, total, (rows < outputs)[:, None] & (cols < inputs)[None, :])


@triton.jit
def conv_dots_kernel(
    a, g, others, parts, size, positions, columns, count, outputs, inputs, deep, high, wide, a_b, a_group, g_b,
    g_c, groups, tiles, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, j, group, tile] = <tile of the gradient, tile of others[j]>; others (size, groups, outputs, inputs)."""
    task = program(0)
    sample, group, tile = task // tiles // groups, task // tiles % groups, task % tiles
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    acc = add_window_product(
        tl.zeros((ROWS, COLS), dtype=ACC), a + sample * a_b + group * a_group,
        g + sample * g_b + group * outputs * g_c, positions, columns, count, rows, outputs, cols, inputs,
        deep, high, wide, g_c, DEPTH, DOT,
    )  # fmt: skip
    inside = (rows < outputs)[:, None] & (cols < inputs)[None, :]
    acc = tl.where(inside, acc, 0.0)
    at = others + (group * outputs + rows[:, None]) * inputs + cols[None, :]
    to = parts + sample * size * groups * tiles + group * tiles + tile
    for _ in range(0, size):
        tl.store(to, hadamard_sum(acc, load_as(at, inside, ACC)))
        at += groups * outputs * inputs
        to += groups * tiles


class _Layer(NamedTuple):
    """What every launch needs of one batch."""

    a: Tensor
    g: Tensor
    window: Sequence[int]
    groups: int

    @property
    def outputs(self) -> int:
        return self.g.shape[1] // self.groups

    @property
    def inputs(self) -> int:
        kernel, channels = self.window[:3], self.a.shape[1] // self.groups
        return channels * kernel[0] * kernel[1] * kernel[2]

    @property
    def positions(self) -> int:
        return self.g.shape[2:].numel()

    @property
    def dtype(self) -> torch.dtype:
        """What is accumulated in and returned."""
        return accumulation_dtype(self.a)

    def empty(self) -> bool:
        """Whether no gradient has an element, or no sample a gradient."""
        return 0 in (self.a.shape[0], self.outputs, self.inputs)

    def tables(self) -> tuple[Tensor, Tensor]:
        """What `add_window_product` takes as positions (5, T) and columns (4, d)."""
        kernel, stride, padding, dilation = (self.window[i : i + 3] for i in (0, 3, 6, 9))
        device = self.a.device
        t = _digits(self.g.shape[2:], device)
        starts = [x * step - pad for x, step, pad in zip(t, stride, padding, strict=True)]
        j = _digits((self.a.shape[1] // self.groups, *kernel), device)
        shifts = [x * step for x, step in zip(j[1:], dilation, strict=True)]
        columns = _offsets((j[0], *shifts), self.a.stride()[1:]), *shifts
        return (
            torch.stack([_offsets(starts, self.a.stride()[2:]), _offsets(t, self.g.stride()[2:]), *starts]),
            torch.stack(columns),
        )

    def tile(self) -> Tile:
        return _tile(self.outputs, self.inputs, self.positions, dot_dtype(self.a, self.g))

    def geometry(self, tile: Tile) -> tuple[tuple[Any, ...], int]:
        """The arguments from `positions` to `col_tiles`, and how many tiles a sample has."""
        col_tiles = triton.cdiv(self.inputs, tile.cols)
        tiles = triton.cdiv(self.outputs, tile.rows) * col_tiles
        channels = self.a.shape[1] // self.groups
        strides = self.a.stride(0), channels * self.a.stride(1), self.g.stride(0), self.g.stride(1)
        sizes = self.positions, self.outputs, self.inputs, *self.a.shape[2:]
        return (*self.tables(), *sizes, *strides, self.groups, tiles, col_tiles), tiles * self.groups

    def constants(self, tile: Tile) -> tuple[Any, ...]:
        dot = dot_dtype(self.a, self.g)
        return tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot)


def _tile(outputs: int, inputs: int, positions: int, dot: tl.dtype) -> Tile:
    """As of a product with two accumulators, because blocks of pointers and masks take as many registers."""
    tile = tile_for(min(outputs, 64), inputs, positions, dot, accumulators=2)
    return tile._replace(num_warps=8 if tile.rows * tile.cols >= 64 * 64 else 4)


def _digits(sizes: Sequence[int], device: torch.device) -> list[Tensor]:
    """Row-major indices of every element of a box, a vector a dimension."""
    grid = torch.meshgrid(*(torch.arange(size, device=device) for size in sizes), indexing="ij")
    return [x.flatten() for x in grid]


def _offsets(index: Sequence[Tensor], strides: Sequence[int]) -> Tensor:
    terms = [x * stride for x, stride in zip(index, strides, strict=True)]
    return torch.stack(terms).sum(0)


def _bias(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum((2, 3, 4), dtype=dtype)


def _gradients(layer: _Layer, w: Tensor | None) -> Tensor:
    """(B, O, d), or the sum with weights (1, O, d)."""
    batch = layer.a.shape[0]
    out = layer.a.new_zeros(batch if w is None else 1, layer.g.shape[1], layer.inputs, dtype=layer.dtype)
    if not layer.empty():
        tile = layer.tile()
        geometry, tiles = layer.geometry(tile)
        conv_gradients_kernel[(len(out) * tiles,)](
            layer.a, layer.g, w, out, batch, *geometry, *layer.constants(tile), w is not None, **tile.launch()
        )
    return out


def conv_sqnorms(a: Tensor, g: Tensor, window: Sequence[int], groups: int, bias: bool, method: int) -> Tensor:
    """The raw operator: a (B, C, D, H, W), g (B, O, ...) -> (B,). Every method goes by tiles of the gradient.

    Scratch: 4 B * groups * tiles bytes (8 for float64), a tile up to 64 x 128 of the gradient, tables of 72 bytes
    a position and column, and 4 B O bytes for the bias.
    """
    layer = _Layer(a, g, window, groups)
    norms = _bias(g, layer.dtype).square().sum(1) if bias else a.new_zeros(a.shape[0], dtype=layer.dtype)
    if layer.empty():
        return norms
    with on_device(a):
        tile = layer.tile()
        geometry, tiles = layer.geometry(tile)
        parts = a.new_empty(a.shape[0], tiles, dtype=layer.dtype)
        conv_norms_kernel[(parts.numel(),)](a, g, parts, *geometry, *layer.constants(tile), **tile.launch())
        return norms + sum_parts(parts, layer.dtype)


def conv_dots(
    a1: Tensor,
    g1: Tensor,
    a2: Tensor,
    g2: Tensor,
    window: Sequence[int],
    groups: int,
    bias: bool,
    summed: bool,
) -> Tensor:
    """The raw operator: (B1, B2), or (B1,) with the sum of the second batch's gradients.

    Scratch: gradients of the second batch, 64 MB at a time or one if that is more, and 4 B1 * groups * tiles bytes
    for each of them (8 for float64).
    """
    first, second = _Layer(a1, g1, window, groups), _Layer(a2, g2, window, groups)
    dtype, m = first.dtype, a2.shape[0]
    others = 1 if summed else m
    dots = a1.new_zeros(a1.shape[0], others, dtype=dtype)
    if bias:
        offsets = _bias(g2, dtype)
        dots = _bias(g1, dtype) @ (offsets.sum(0, keepdim=True) if summed else offsets).T
    if not first.empty() and m > 0:
        with on_device(a1):
            if summed:
                dots = dots + _dots(first, _gradients(second, a2.new_ones(m, dtype=dtype)))
            else:
                chunk = max(1, _MOST_BYTES // (g2.shape[1] * second.inputs * dtype.itemsize))
                pieces = [
                    second._replace(a=x, g=y) for x, y in zip(a2.split(chunk), g2.split(chunk), strict=True)
                ]
                dots = dots + torch.cat([_dots(first, _gradients(piece, None)) for piece in pieces], 1)
    return dots[:, 0] if summed else dots


def _dots(layer: _Layer, others: Tensor) -> Tensor:
    """Products (B, m) of every gradient with each of some others."""
    tile = layer.tile()
    geometry, tiles = layer.geometry(tile)
    batch, size = layer.a.shape[0], others.shape[0]
    parts = others.new_empty(batch * size, tiles)
    conv_dots_kernel[(batch * tiles,)](
        layer.a, layer.g, others, parts, size, *geometry, *layer.constants(tile), **tile.launch()
    )
    return sum_parts(parts, layer.dtype).view(batch, size)


def conv_grads(
    a: Tensor, g: Tensor, w: Tensor | None, window: Sequence[int], groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    """The raw operator: weights (B, O, C / groups, *kernel) and biases (B, O), or their sums; no bias: 0 columns."""
    layer = _Layer(a, g, window, groups)
    with on_device(a):
        weight = _gradients(layer, w)
    weight = weight.unflatten(-1, (a.shape[1] // groups, *window[:3]))
    offset = _bias(g, layer.dtype) if bias else a.new_empty(a.shape[0], 0, dtype=layer.dtype)
    return (weight, offset) if w is None else (weight[0], w @ offset)


def _case(kernel: Any, dtype: str, pointers: tuple[str, ...], **constants: Any) -> AotCase:
    """A layer of 128 channels and more, with maps of one type."""
    dot = DTYPES[dtype]
    tile, acc = _tile(128, 1152, 1024, dot), acc_dtype(dot)
    blocks = {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "DOT": dot, "ACC": acc}
    return AotCase(
        kernel,
        {"a": dtype, "g": dtype, "positions": "i64", "columns": "i64", **dict.fromkeys(pointers, str(acc))},
        {**blocks, **constants},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=("count", "outputs", "inputs", "a_b", "a_group", "g_b", "g_c"),
        tensor_cores=dtype == "bf16",
    )


def _cases(dtype: str) -> tuple[AotCase, ...]:
    return (
        _case(conv_norms_kernel, dtype, ("parts",)),
        _case(conv_gradients_kernel, dtype, ("out",), SUMMED=False, w=None),
        _case(conv_gradients_kernel, dtype, ("w", "out"), SUMMED=True),
        _case(conv_dots_kernel, dtype, ("others", "parts")),
    )


AOT: Final = tuple(case for dtype in ("fp32", "bf16", "fp64") for case in _cases(dtype))

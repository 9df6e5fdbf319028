"""Projections of per-sample gradients of a linear layer, two-sided and by random signs."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_dot,
    add_product,
    block_size,
    dot_dtype,
    launch_options,
    on_device,
    program,
    span,
    store_as,
    tile_for,
)
from unlearn_kernels.triton_kernels.influence import signed_sum
from unlearn_kernels.triton_kernels.per_sample.linear_sums import linear_grads

_SIGN_RUN: Final = 2048  # coordinates whose sum is a chain; slabs hold whole runs
_SLAB: Final = 1 << 24  # elements of gradients in memory at once, at least one row of each


@triton.jit
def two_sided_kernel(
    a, g, left, right, out, tokens, inputs, outputs, left_rows, right_rows, width, a_b, a_t, a_d, g_b, g_t, g_p,
    l_k, l_p, r_k, r_d, row_tiles, col_tiles, BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, DOT_A: tl.constexpr, DOT_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[b] = (G_b L^T)^T (A_b R^T) row by row, TOKENS at a time, then L sum_t g_t."""
    task = program(0)
    tiles = row_tiles * col_tiles
    b, tile = task // tiles, task % tiles
    row, col = tile // col_tiles, tile % col_tiles
    rows, cols = span(row * ROWS, ROWS), span(col * COLS, COLS)
    a += b * a_b
    g += b * g_b
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    offset = tl.zeros((ROWS,), dtype=ACC)
    for start in range(0, tokens, TOKENS):
        t = span(tl.to_tensor(start), TOKENS)
        y = tl.zeros((ROWS, TOKENS), dtype=ACC)
        y = add_product(y, left, l_k, l_p, rows, left_rows, g, g_t, g_p, t, tokens, outputs, DEPTH, DOT_G)
        x = tl.zeros((TOKENS, COLS), dtype=ACC)
        x = add_product(x, a, a_t, a_d, t, tokens, right, r_k, r_d, cols, right_rows, inputs, DEPTH, DOT_A)
        acc = add_dot(acc, y, x)
        if BIAS:
            offset += tl.sum(y, axis=1)
    inside = (rows < left_rows)[:, None] & (cols < right_rows)[None, :]
    out += b * width
    store_as(out + rows[:, None] * right_rows + cols[None, :], acc, inside)
    if BIAS:
        store_as(out + left_rows * right_rows + rows, offset, (rows < left_rows) & (col == 0))


def _at_once(dot: tl.dtype) -> int:
    """Tokens that are projected at a time: what the registers hold."""
    return 16 if dot == tl.float64 else 32


def linear_two_sided(a: Tensor, g: Tensor, left: Tensor, right: Tensor, bias: bool) -> Tensor:
    """The raw operator: a (B, T, d), g (B, T, p), left (k_o, p), right (k_i, d) -> (B, k_o k_i (+ k_o)). No scratch."""
    (batch, tokens, inputs), outputs = a.shape, g.shape[2]
    left_rows, right_rows = left.shape[0], right.shape[0]
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    out = a.new_empty(batch, left_rows * (right_rows + bias), dtype=dtype)
    of_a, of_g = dot_dtype(a, right), dot_dtype(g, left)
    tile = tile_for(left_rows, right_rows, max(inputs, outputs), acc_dtype(of_a), accumulators=2)
    # A bias needs a column of tiles even where the weight's projection has none.
    row_tiles, col_tiles = triton.cdiv(left_rows, tile.rows), max(triton.cdiv(right_rows, tile.cols), 1)
    if batch * row_tiles > 0:
        with on_device(a):
            two_sided_kernel[(batch * row_tiles * col_tiles,)](
                a, g, left, right, out, tokens, inputs, outputs, left_rows, right_rows, out.shape[1], *a.stride(),
                *g.stride(), *left.stride(), *right.stride(), row_tiles, col_tiles, bias,
                block_size(tokens, _at_once(of_a)), tile.rows, tile.cols, tile.depth, of_a, of_g, acc_dtype(of_a),
                **tile.launch(),
            )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["seed"])
def slab_kernel(
    slab, parts, batch, begin, end, outputs, seed, s_b, row_tiles, col_tiles, count, FIRST: tl.constexpr,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, j, part] (+)= coordinates begin ... end - 1 of sample b times the signs of row j, by runs."""
    task = program(0)
    part, tile = task // (row_tiles * col_tiles), task % (row_tiles * col_tiles)
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    for start in range(begin + part * RUN, end, count * RUN):
        last = tl.minimum(end, start + RUN)
        acc += signed_sum(slab - begin, None, seed, start, last, s_b, 1, rows, batch, cols, ACC, ACC, False)
    at = parts + (rows[:, None] * outputs + cols[None, :]) * count + part
    inside = (rows < batch)[:, None] & (cols < outputs)[None, :]
    if not FIRST:
        acc += tl.load(at, mask=inside, other=0.0).to(ACC)
    tl.store(at, acc, mask=inside)


def linear_sketch(a: Tensor, g: Tensor, bias: bool, k: int, seed: int) -> Tensor:
    """The raw operator: a (B, T, d), g (B, T, p) -> (B, k).

    Rows of the gradients are formed some at a time, laid out as coordinates and sketched by whole runs of 2048.
    Scratch: at most `max(64 MB, 4 B d) + 8 KB * B` of gradients and `128 B k` bytes of sums (twice for float64).
    """
    (batch, _, inputs), outputs = a.shape, g.shape[2]
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    if batch * k * outputs * (inputs + bias) == 0:
        return a.new_zeros(batch, k, dtype=wide)
    sketch = _Sketch(batch, k, seed, a.new_empty(batch * k, 32, dtype=wide))
    waiting = a.new_empty(batch, 0, dtype=wide)
    rows = max(_SLAB // max(batch * inputs, 1), 1)
    for first in range(0, outputs, rows):
        weight, _ = linear_grads(a, g[:, :, first : first + rows], False)
        waiting = sketch.take(torch.cat([waiting, weight.flatten(1)], dim=1))
    if bias:
        waiting = torch.cat([waiting, g.sum(1, dtype=wide)], dim=1)
    sketch.add(waiting)
    return sketch.result()


class _Sketch:
    """The sums of a projection while coordinates come in."""

    def __init__(self, batch: int, k: int, seed: int, parts: Tensor) -> None:
        self.batch, self.k, self.seed, self.parts, self.done = batch, k, seed, parts, 0

    def take(self, slab: Tensor) -> Tensor:
        """Sketches whole runs; returns the rest."""
        whole = slab.shape[1] // _SIGN_RUN * _SIGN_RUN
        self.add(slab[:, :whole])
        return slab[:, whole:]

    def add(self, slab: Tensor) -> None:
        """Sketches all; another slab may follow whole runs alone."""
        if slab.shape[1] == 0:
            return
        rows, cols = block_size(self.batch, 64), block_size(self.k, 64)
        row_tiles, col_tiles = triton.cdiv(self.batch, rows), triton.cdiv(self.k, cols)
        count, end = self.parts.shape[1], self.done + slab.shape[1]
        with on_device(slab):
            slab_kernel[(count * row_tiles * col_tiles,)](
                slab, self.parts, self.batch, self.done, end, self.k, self.seed, slab.stride(0), row_tiles, col_tiles,
                count, FIRST=self.done == 0, RUN=_SIGN_RUN, ROWS=rows, COLS=cols, ACC=acc_dtype(dot_dtype(slab)),
                **launch_options(8),
            )  # fmt: skip
        self.done = end

    def result(self) -> Tensor:
        scaled = self.parts.sum(1, dtype=torch.float64) / self.k**0.5
        return scaled.to(self.parts.dtype).view(self.batch, self.k)


def _two_sided_case(dtype: str) -> AotCase:
    dot = DTYPES[dtype]
    acc = acc_dtype(dot)
    tile = tile_for(64, 64, 1024, acc, accumulators=2)
    constants: dict[str, Any] = {
        "a_d": 1, "g_p": 1, "l_p": 1, "r_d": 1, "BIAS": True, "TOKENS": _at_once(dot), "ROWS": tile.rows,
        "COLS": tile.cols, "DEPTH": tile.depth, "DOT_A": dot, "DOT_G": dot, "ACC": acc,
    }  # fmt: skip
    return AotCase(
        two_sided_kernel,
        {**dict.fromkeys(("a", "g", "left", "right"), dtype), "out": str(acc)},
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=("a_b", "a_t", "g_b", "g_t", "l_k", "r_k", "inputs", "outputs", "tokens"),
        tensor_cores=dtype == "bf16",
    )


AOT: Final = (
    *(_two_sided_case(dtype) for dtype in ("fp32", "bf16", "fp64")),
    *(
        AotCase(
            slab_kernel,
            {"slab": dtype, "parts": dtype},
            {"FIRST": False, "RUN": _SIGN_RUN, "ROWS": 16, "COLS": 64, "ACC": DTYPES[dtype]},
            num_warps=8,
        )
        for dtype in ("fp32", "fp64")
    ),
)

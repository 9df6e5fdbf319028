"""Inner products of per-sample gradients of a linear layer, none of which is in memory."""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_product,
    dot_dtype,
    hadamard_sum,
    on_device,
    program,
    span,
    sum_parts,
    tile_for,
)
from unlearn_kernels.triton_kernels.per_sample.linear import token_sum


@triton.jit
def tokens_kernel(
    a1, g1, a2, g2, parts, samples2, tokens1, tokens2, inputs, outputs, a1_b, a1_t, a1_d, g1_b, g1_t, g1_p,
    a2_b, a2_t, a2_d, g2_b, g2_t, g2_p, col_tiles, tiles, BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, DOT_A: tl.constexpr, DOT_G: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[i, j, tile] = sum over a tile of (A_i A'_j^T + bias) * (G_i G'_j^T)."""
    task = program(0)
    pair, tile = task // tiles, task % tiles
    i, j = pair // samples2, pair % samples2
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    zeros = tl.zeros((ROWS, COLS), dtype=ACC)
    of_a = add_product(
        zeros,
        a1 + i * a1_b,
        a1_t,
        a1_d,
        rows,
        tokens1,
        a2 + j * a2_b,
        a2_t,
        a2_d,
        cols,
        tokens2,
        inputs,
        DEPTH,
        DOT_A,
    )
    of_g = add_product(
        zeros, g1 + i * g1_b, g1_t, g1_p, rows, tokens1, g2 + j * g2_b, g2_t, g2_p, cols, tokens2, outputs, DEPTH,
        DOT_G,
    )  # fmt: skip
    inside = (rows < tokens1)[:, None] & (cols < tokens2)[None, :]
    tl.store(parts + task, hadamard_sum(tl.where(inside, of_a + BIAS, 0.0), tl.where(inside, of_g, 0.0)))


@triton.jit
def direct_dots_kernel(
    a1, g1, a2, g2, parts, samples1, held, each, tokens1, tokens2, inputs, outputs, a1_b, a1_t, a1_d, g1_b, g1_t,
    g1_p, a2_b, a2_t, a2_d, g2_b, g2_t, g2_p, row_tiles, col_tiles, tiles, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[i, h, tile] = <tile of W_i, tile of the sum of W'_j over the `each` samples that h holds>.

    Tiles from row_tiles * col_tiles on are the bias gradient's.
    """
    task = program(0)
    h, tile = task // tiles, task % tiles
    if tile < row_tiles * col_tiles:
        rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
        kept = tl.zeros((ROWS, COLS), dtype=ACC)
        for j in range(h * each, (h + 1) * each):
            kept = add_product(
                kept, g2 + j * g2_b, g2_p, g2_t, rows, outputs, a2 + j * a2_b, a2_d, a2_t, cols, inputs, tokens2,
                DEPTH, DOT,
            )  # fmt: skip
        inside = (rows < outputs)[:, None] & (cols < inputs)[None, :]
        kept = tl.where(inside, kept, 0.0)
        for i in range(0, samples1):
            i = tl.to_tensor(i).to(tl.int64)
            acc = tl.zeros((ROWS, COLS), dtype=ACC)
            acc = add_product(
                acc, g1 + i * g1_b, g1_p, g1_t, rows, outputs, a1 + i * a1_b, a1_d, a1_t, cols, inputs, tokens1,
                DEPTH, DOT,
            )  # fmt: skip
            tl.store(parts + (i * held + h) * tiles + tile, hadamard_sum(kept, tl.where(inside, acc, 0.0)))
    else:
        rows = span((tile - row_tiles * col_tiles) * ROWS, ROWS)
        column = tl.zeros((ROWS,), dtype=ACC)
        for j in range(h * each, (h + 1) * each):
            column += token_sum(g2 + j * g2_b, g2_t, g2_p, rows, outputs, tokens2, DEPTH, ACC)
        for i in range(0, samples1):
            i = tl.to_tensor(i).to(tl.int64)
            mine = token_sum(g1 + i * g1_b, g1_t, g1_p, rows, outputs, tokens1, DEPTH, ACC)
            tl.store(parts + (i * held + h) * tiles + tile, tl.sum(column * mine, axis=0))


class _Sides(NamedTuple):
    a1: Tensor
    g1: Tensor
    a2: Tensor
    g2: Tensor

    @property
    def strides(self) -> tuple[int, ...]:
        return (*self.a1.stride(), *self.g1.stride(), *self.a2.stride(), *self.g2.stride())

    @property
    def dtype(self) -> torch.dtype:
        """What is accumulated in and returned."""
        return torch.float64 if self.a1.dtype == torch.float64 else torch.float32

    def empty(self, *shape: int) -> Tensor:
        return self.a1.new_empty(shape, dtype=self.dtype)


def linear_dots(
    a1: Tensor, g1: Tensor, a2: Tensor, g2: Tensor, summed: bool, bias: bool, method: int
) -> Tensor:
    """The raw operator: (B1, T1, d), (B1, T1, p), (B2, T2, d), (B2, T2, p) -> (B1, B2), or (B1,) when summed.

    Methods: 0 tokens; 1 direct, which keeps one tile of side 2 in registers and forms those of side 1 again for
    each sample of side 2 (once when summed). Scratch: 4 B1 B2 * tiles bytes (8 for float64).
    """
    sides, held = _Sides(a1, g1, a2, g2), 1 if summed else a2.shape[0]
    shape = (a1.shape[0],) if summed else (a1.shape[0], held)
    if 0 in (*a1.shape[:2], *a2.shape[:2], g1.shape[2]):
        return sides.empty(*shape).zero_()
    with on_device(a1):
        parts = (_by_tokens if method == 0 else _direct)(sides, held, bias)
        return sum_parts(parts.view(a1.shape[0] * held, -1), sides.dtype).view(shape)


def _by_tokens(sides: _Sides, held: int, bias: bool) -> Tensor:
    a1, g1, a2, g2 = sides
    (tokens1, inputs), (samples2, tokens2), outputs = a1.shape[1:], a2.shape[:2], g1.shape[2]
    of_a, of_g = dot_dtype(a1, a2), dot_dtype(g1, g2)
    dot = of_a if of_a.primitive_bitwidth >= of_g.primitive_bitwidth else of_g
    tile = tile_for(tokens1, tokens2, max(inputs, outputs), dot, accumulators=2)
    col_tiles = triton.cdiv(tokens2, tile.cols)
    tiles = triton.cdiv(tokens1, tile.rows) * col_tiles
    parts = sides.empty(a1.shape[0], samples2, tiles)
    tokens_kernel[(parts.numel(),)](
        *sides, parts, samples2, tokens1, tokens2, inputs, outputs, *sides.strides, col_tiles, tiles, bias,
        tile.rows, tile.cols, tile.depth, of_a, of_g, acc_dtype(dot), **tile.launch(),
    )  # fmt: skip
    return parts


def _direct(sides: _Sides, held: int, bias: bool) -> Tensor:
    a1, g1, a2, g2 = sides
    (samples1, tokens1, inputs), (samples2, tokens2), outputs = a1.shape, a2.shape[:2], g1.shape[2]
    dot = dot_dtype(a1, g1, a2, g2)
    tile = tile_for(outputs, inputs, max(tokens1, tokens2), dot, accumulators=2)
    row_tiles, col_tiles = triton.cdiv(outputs, tile.rows), triton.cdiv(inputs, tile.cols)
    tiles = row_tiles * (col_tiles + bias)
    parts = sides.empty(samples1, held, tiles)
    if tiles == 0:
        return parts
    direct_dots_kernel[(held * tiles,)](
        *sides, parts, samples1, held, samples2 // held, tokens1, tokens2, inputs, outputs, *sides.strides,
        row_tiles, col_tiles, tiles, tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot), **tile.launch(),
    )  # fmt: skip
    return parts


_STRIDES: Final = tuple(
    f"{x}{side}_{n}" for side in (1, 2) for x, n in (("a", "b"), ("a", "t"), ("g", "b"), ("g", "t"))
)
_LAYER: Final = (*_STRIDES, "inputs", "outputs", "tokens1", "tokens2")


def _case(kernel: Any, dtype: str, size: tuple[int, int, int], **constants: Any) -> AotCase:
    dot = DTYPES[dtype]
    acc, tile = acc_dtype(dot), tile_for(*size, dot, accumulators=2)
    blocks = {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "ACC": acc}
    contiguous = {"a1_d": 1, "g1_p": 1, "a2_d": 1, "g2_p": 1}
    return AotCase(
        kernel,
        {**dict.fromkeys(("a1", "g1", "a2", "g2"), dtype), "parts": str(acc)},
        {**contiguous, **constants, **blocks},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=_LAYER,
        tensor_cores=dtype == "bf16",
    )


AOT: Final = tuple(
    case
    for dtype in ("fp32", "bf16", "fp64")
    for case in (
        _case(tokens_kernel, dtype, (512, 512, 1024), BIAS=True, DOT_A=DTYPES[dtype], DOT_G=DTYPES[dtype]),
        _case(direct_dots_kernel, dtype, (1024, 1024, 512), DOT=DTYPES[dtype]),
    )
)

"""Per-sample gradients of a linear layer, and their weighted sum over the batch."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_product,
    dot_dtype,
    on_device,
    program,
    span,
    store_as,
    tile_for,
)
from unlearn_kernels.triton_kernels.per_sample.linear import token_sum


@triton.jit
def sums_kernel(
    a, g, w, weight, bias, group_size, tokens, inputs, outputs, a_b, a_t, a_d, g_b, g_t, g_p, row_tiles, col_tiles,
    tiles, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """weight[group] = sum over the group's samples of w_b G_b^T A_b; tiles from row_tiles * col_tiles on, bias."""
    task = program(0)
    group, tile = task // tiles, task % tiles
    first = group * group_size
    if tile < row_tiles * col_tiles:
        rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
        acc = tl.zeros((ROWS, COLS), dtype=ACC)
        for b in range(first, first + group_size):
            part = tl.zeros((ROWS, COLS), dtype=ACC)
            part = add_product(
                part,
                g + b * g_b,
                g_p,
                g_t,
                rows,
                outputs,
                a + b * a_b,
                a_d,
                a_t,
                cols,
                inputs,
                tokens,
                DEPTH,
                DOT,
            )
            acc += part * sample_weight(w, b, WEIGHTED, ACC)
        inside = (rows < outputs)[:, None] & (cols < inputs)[None, :]
        store_as(weight + (group * outputs + rows[:, None]) * inputs + cols[None, :], acc, inside)
    else:
        rows = span((tile - row_tiles * col_tiles) * ROWS, ROWS)
        column = tl.zeros((ROWS,), dtype=ACC)
        for b in range(first, first + group_size):
            part = token_sum(g + b * g_b, g_t, g_p, rows, outputs, tokens, DEPTH, ACC)
            column += part * sample_weight(w, b, WEIGHTED, ACC)
        store_as(bias + group * outputs + rows, column, rows < outputs)


@triton.jit
def sample_weight(w, b, WEIGHTED: tl.constexpr, ACC: tl.constexpr):
    """The weight of a sample, or 1."""
    weight = tl.full((), 1.0, dtype=ACC)
    if WEIGHTED:
        weight = tl.load(w + b).to(ACC)
    return weight


def linear_weighted_sum(a: Tensor, g: Tensor, w: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The raw operator: a (B, T, d), g (B, T, p), w (B,) -> (p, d) and (p,) or empty, in the dtype of g."""
    weight, offset = _sums(a, g, w, bias, groups=1, dtype=g.dtype)
    return weight[0], offset[0] if bias else offset.flatten()


def linear_grads(a: Tensor, g: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    """The raw operator: a (B, T, d), g (B, T, p) -> (B, p, d) and (B, p) or (0, p), fp32 (fp64 for fp64)."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return _sums(a, g, None, bias, groups=a.shape[0], dtype=dtype)


def _sums(
    a: Tensor, g: Tensor, w: Tensor | None, bias: bool, *, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    batch, tokens, inputs = a.shape
    outputs = g.shape[2]
    weight = g.new_empty(groups, outputs, inputs, dtype=dtype)
    offset = g.new_empty(groups if bias else 0, outputs, dtype=dtype)
    dot = dot_dtype(a, g)
    tile = tile_for(outputs, inputs, tokens, dot, accumulators=2)
    row_tiles, col_tiles = triton.cdiv(outputs, tile.rows), triton.cdiv(inputs, tile.cols)
    tiles = row_tiles * (col_tiles + bias)
    if groups * tiles > 0:
        with on_device(a):
            sums_kernel[(groups * tiles,)](
                a, g, w, weight, offset, batch // groups, tokens, inputs, outputs, *a.stride(), *g.stride(),
                row_tiles, col_tiles, tiles, w is not None, tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot),
                **tile.launch(),
            )  # fmt: skip
    return weight, offset


_LAYER: Final = ("a_b", "a_t", "g_b", "g_t", "inputs", "outputs", "tokens")


def _case(dtype: str, weighted: bool) -> AotCase:
    dot = DTYPES[dtype]
    acc, tile = acc_dtype(dot), tile_for(1024, 1024, 512, dot, accumulators=2)
    out = dtype if weighted else str(acc)
    constants: dict[str, Any] = {
        "a_d": 1, "g_p": 1, "WEIGHTED": weighted, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth,
        "DOT": dot, "ACC": acc,
    }  # fmt: skip
    return AotCase(
        sums_kernel,
        {"a": dtype, "g": dtype, "w": str(acc), "weight": out, "bias": out},
        constants,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=_LAYER,
        tensor_cores=dtype == "bf16",
    )


AOT: Final = tuple(_case(dtype, weighted) for dtype in ("fp32", "bf16", "fp64") for weighted in (False, True))

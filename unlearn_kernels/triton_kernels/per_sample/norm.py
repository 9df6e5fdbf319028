"""Per-sample gradients of normalisation layers: statistics of each token or group, then sums over positions."""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    block_size,
    dot_dtype,
    launch_options,
    load_as,
    on_device,
    program,
    span,
    sum_parts,
)

_RMS, _GROUP = 1, 2
_BLOCK: Final = 1024
_ROWS: Final = 16
_COLS: Final = 64
_PARTS: Final = 32  # of the positions of a sample, at most


@triton.jit
def line_sum(
    x, x_line, x_at, length, count, shift, SQUARED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """The sum over `count` elements of lines laid end to end of y = x - shift, or of y^2."""
    acc = tl.zeros((BLOCK,), dtype=ACC)
    for start in range(0, count, BLOCK):
        i = span(start, BLOCK)
        y = load_as(x + i // length * x_line + i % length * x_at, i < count, ACC) - shift
        y = tl.where(i < count, y, 0.0)
        acc += y * y if SQUARED else y
    return tl.sum(acc, axis=0)


@triton.jit
def statistics_kernel(
    x, shifts, scales, offsets, stats, per, length, x_b, x_line, x_at,
    EPS: tl.constexpr, CENTRED: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x_hat = (x - shift) scale + offset of statistic s of a sample, taken over lines s per ... (s + 1) per - 1.

    The offset is what rounding has left of the mean.
    """
    task = program(0)
    x += task // stats * x_b + task % stats * per * x_line
    count = per * length
    shift = tl.zeros((), dtype=ACC)
    rest = tl.zeros((), dtype=ACC)
    if CENTRED:
        shift = line_sum(x, x_line, x_at, length, count, shift, False, BLOCK, ACC) / count
        rest = line_sum(x, x_line, x_at, length, count, shift, False, BLOCK, ACC) / count
    square = line_sum(x, x_line, x_at, length, count, shift, True, BLOCK, ACC) / count
    scale = 1.0 / tl.sqrt(square - rest * rest + EPS)
    tl.store(shifts + task, shift)
    tl.store(scales + task, scale)
    tl.store(offsets + task, -rest * scale)


@triton.jit
def gradient_kernel(
    x, g, shifts, scales, offsets, parts, outs, depth, chunk, stats, per, x_b, x_out, x_depth, g_b, g_out, g_depth,
    out_tiles, count, GROUPED: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, 0, out, part] = sum of x_hat g over a chunk of positions; parts[b, 1, out, part] that of g."""
    task = program(0)
    part, tile, sample = task % count, task // count % out_tiles, task // count // out_tiles
    out = span(tile * COLS, COLS)
    x += sample * x_b
    g += sample * g_b
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    bias = tl.zeros((ROWS, COLS), dtype=ACC)
    end = tl.minimum(depth, (part + 1) * chunk)
    for start in range(part * chunk, end, ROWS):
        at = span(start, ROWS)
        inside = (at < end)[:, None] & (out < outs)[None, :]
        if GROUPED:
            of, known = sample * stats + out[None, :] // per, (out < outs)[None, :]
        else:
            of, known = sample * stats + at[:, None], (at < end)[:, None]
        u = load_as(g + at[:, None] * g_depth + out[None, :] * g_out, inside, ACC)
        v = load_as(x + at[:, None] * x_depth + out[None, :] * x_out, inside, ACC)
        shift, scale = load_as(shifts + of, known, ACC), load_as(scales + of, known, ACC)
        hat = (v - shift) * scale + load_as(offsets + of, known, ACC)
        acc += tl.where(inside, hat * u, 0.0)
        if BIAS:
            bias += u
    to = parts + (sample * (1 + BIAS) * outs + out) * count + part
    tl.store(to, tl.sum(acc, axis=0), mask=out < outs)
    if BIAS:
        tl.store(to + outs * count, tl.sum(bias, axis=0), mask=out < outs)


def norm_grads(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    """The raw operator: x, g (B, T, d) -> (B, 1 + bias, d); for groups (B, C, S) -> (B, 1 + bias, C).

    Scratch: 12 bytes a token (a group), and `4 (1 + bias) B d` for each of at most 32 parts.
    """
    acc = acc_dtype(dot_dtype(x, g))
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    grouped = kind == _GROUP
    batch, lines, length = x.shape
    outs, depth = (lines, length) if grouped else (length, lines)
    if 0 in x.shape:
        return x.new_zeros(batch, 1 + bias, outs, dtype=dtype)
    stats, per = (groups, lines // groups) if grouped else (lines, 1)
    statistics = tuple(torch.empty(batch * stats, dtype=dtype, device=x.device) for _ in range(3))
    rows, cols = (_COLS, _ROWS) if grouped else (_ROWS, _COLS)
    out_tiles, chunk = triton.cdiv(outs, cols), triton.cdiv(triton.cdiv(depth, _PARTS), rows) * rows
    count = triton.cdiv(depth, chunk)
    parts = torch.empty(batch * (1 + bias) * outs, count, dtype=dtype, device=x.device)
    (x_b, x_line, x_at), (g_b, g_line, g_at) = x.stride(), g.stride()
    x_order, g_order = ((x_line, x_at), (g_line, g_at)) if grouped else ((x_at, x_line), (g_at, g_line))
    with on_device(x):
        statistics_kernel[(batch * stats,)](
            x, *statistics, stats, per, length, x_b, x_line, x_at,
            EPS=eps, CENTRED=kind != _RMS, BLOCK=block_size(per * length, _BLOCK), ACC=acc, **launch_options(),
        )  # fmt: skip
        gradient_kernel[(batch * out_tiles * count,)](
            x, g, *statistics, parts, outs, depth, chunk, stats, per, x_b, *x_order, g_b, *g_order, out_tiles, count,
            GROUPED=grouped, BIAS=bias, ROWS=rows, COLS=cols, ACC=acc, **launch_options(),
        )  # fmt: skip
    return (parts if count == 1 else sum_parts(parts, dtype)).reshape(batch, 1 + bias, outs)


def norm_sqnorms(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    """The raw operator: (B,), through the gradients. Scratch: theirs and `12 (1 + bias) B d` bytes."""
    rows = norm_grads(x, g, kind, groups, eps, bias)
    return rows.double().square().sum(dim=(1, 2)).to(rows.dtype)


_STATISTICS: Final = ("shifts", "scales", "offsets")


def _cases(dtype: str) -> tuple[AotCase, ...]:
    acc = acc_dtype(DTYPES[dtype])
    wide = dict.fromkeys((*_STATISTICS, "parts"), str(acc))
    statistics = {name: str(acc) for name in _STATISTICS}
    block: dict[str, Any] = {"BLOCK": _BLOCK, "ACC": acc}
    tile: dict[str, Any] = {"BIAS": True, "ACC": acc}
    aligned = ("x_b", "g_b", "outs", "chunk")
    return (
        AotCase(
            statistics_kernel,
            {"x": dtype, **statistics},
            {"x_at": 1, "EPS": 1e-5, "CENTRED": True, **block},
            multiples_of_16=("length", "x_b", "x_line"),
        ),
        AotCase(
            gradient_kernel,
            {"x": dtype, "g": dtype, **wide},
            {"x_out": 1, "g_out": 1, "GROUPED": False, "ROWS": _ROWS, "COLS": _COLS, **tile},
            multiples_of_16=(*aligned, "x_depth", "g_depth"),
        ),
        AotCase(
            gradient_kernel,
            {"x": dtype, "g": dtype, **wide},
            {"x_depth": 1, "g_depth": 1, "GROUPED": True, "ROWS": _COLS, "COLS": _ROWS, **tile},
            multiples_of_16=(*aligned, "x_out", "g_out", "depth"),
        ),
    )


AOT: Final = tuple(case for dtype in ("fp32", "bf16", "fp64") for case in _cases(dtype))

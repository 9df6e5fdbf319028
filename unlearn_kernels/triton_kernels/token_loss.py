"""Negative log-likelihoods of a language-model head without its logits in memory.

Rows whose label counts are gathered to the front, so that programs past their number end at once; that number
stays on the device. Forward: a program reduces a block of rows over a part of the vocabulary to (peak, mass);
the parts are merged in order. Backward: for a block of the vocabulary at a time, P = grad (softmax - onehot),
then `d_weight = P^T h` and `d_h += P weight` from it. No atomics: the same call gives the same bits.
"""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.token_loss import preference_slopes
from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    Tile,
    acc_dtype,
    add_product,
    dot_dtype,
    launch_options,
    load_as,
    lse_merge,
    lse_update,
    lse_value,
    on_device,
    program,
    span,
    store_as,
    tile_for,
)

# Programs that fill a large GPU, and bytes of P at a time.
_PROGRAMS: Final = 1024
_BLOCK_BYTES: Final = 64 << 20


@triton.jit
def tanh(x, ACC: tl.constexpr):
    """Its series near 0, where the quotient of exponentials would cancel."""
    square = x * x
    series = 62.0 / 2835.0 - square * (1382.0 / 155925.0)
    series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * series)
    series = x + x * square * (-1.0 / 3.0 + square * series)
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    near: tl.constexpr = 0.02 if ACC == tl.float64 else 0.35
    return tl.where(tl.abs(x) < near, series, tl.where(x < 0, -far, far))


@triton.jit
def chain(z, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """`dz / d(h W^T + b)`."""
    if SOFTCAP == 0.0:
        return z * 0.0 + SCALE
    # 1 - (z / SOFTCAP)^2 would lose what a difference keeps near the cap.
    return (SOFTCAP - z) * (SOFTCAP + z) * (SCALE / (SOFTCAP * SOFTCAP))


@triton.jit
def logits_tile(
    h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr = 1.0, SOFTCAP: tl.constexpr = 0.0,
):  # fmt: skip
    """`h[rows] weight[cols]^T + bias[cols]`, scaled and capped, -inf past the vocabulary."""
    z = tl.zeros((ROWS, COLS), dtype=ACC)
    z = add_product(z, h, h_r, h_d, rows, count, weight, w_v, w_d, cols, vocabulary, features, DEPTH, DOT)
    if bias is not None:
        z += load_as(bias + cols * b_v, cols < vocabulary, ACC)[None, :]
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP != 0.0:
        z = tanh(z / SOFTCAP, ACC) * SOFTCAP
    return tl.where((cols < vocabulary)[None, :], z, float("-inf"))


@triton.jit
def parts_kernel(
    h, weight, bias, labels, kept, peaks, masses, picked, h_r, h_d, w_v, w_d, b_v, rows_all, vocabulary,
    features, splits, split_cols, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(peak, mass, logit of the label) of some rows over one part of the vocabulary, at [split, row]."""
    task = program(0)
    split, rows = task % splits, span(task // splits * ROWS, ROWS)
    count = tl.load(kept).to(tl.int64)
    if task // splits * ROWS < count:
        label = tl.load(labels + rows, mask=rows < count, other=-1).to(tl.int64)
        peak = tl.full((ROWS,), float("-inf"), dtype=ACC)
        mass = tl.zeros((ROWS,), dtype=ACC)
        found = tl.zeros((ROWS,), dtype=ACC)
        for start in range(split * split_cols, tl.minimum((split + 1) * split_cols, vocabulary), COLS):
            cols = span(start, COLS)
            z = logits_tile(
                h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features, ROWS, COLS,
                DEPTH, DOT, ACC, SCALE, SOFTCAP,
            )  # fmt: skip
            found += tl.sum(tl.where(cols[None, :] == label[:, None], z, 0.0), axis=1)
            peak, mass = lse_update(peak, mass, z)
        at = split * rows_all + rows
        tl.store(peaks + at, peak, mask=rows < count)
        tl.store(masses + at, mass, mask=rows < count)
        tl.store(picked + at, found, mask=rows < count)


@triton.jit
def merge_kernel(
    peaks, masses, picked, labels, kept, nll, lse, rows_all, vocabulary, splits,
    ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merges the parts of each row in order; NaN for a label out of range, 0 for rows that do not count."""
    rows = span(program(0) * ROWS, ROWS)
    count = tl.load(kept).to(tl.int64)
    inside = rows < count
    peak = tl.full((ROWS,), float("-inf"), dtype=ACC)
    mass = tl.zeros((ROWS,), dtype=ACC)
    found = tl.zeros((ROWS,), dtype=ACC)
    for split in range(0, splits):
        at = split * rows_all + rows
        part = tl.load(peaks + at, mask=inside, other=float("-inf")).to(ACC)
        peak, mass = lse_merge(peak, mass, part, load_as(masses + at, inside, ACC))
        found += load_as(picked + at, inside, ACC)
    label = tl.load(labels + rows, mask=inside, other=0).to(tl.int64)
    found = tl.where((label >= 0) & (label < vocabulary), found, float("nan"))
    value = lse_value(peak, mass)
    store_as(nll + rows, tl.where(inside, value - found, 0.0), rows < rows_all)
    store_as(lse + rows, tl.where(inside, value, 0.0), rows < rows_all)


@triton.jit
def probabilities_kernel(
    h, weight, bias, labels, kept, grad, lse, p, h_r, h_d, w_v, w_d, b_v, vocabulary, features, begin, end,
    p_r, col_tiles, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """P[row, column - begin] = grad (softmax - onehot) for columns from `begin` to `end`."""
    task = program(0)
    rows, cols = span(task // col_tiles * ROWS, ROWS), begin + span(task % col_tiles * COLS, COLS)
    count = tl.load(kept).to(tl.int64)
    if task // col_tiles * ROWS < count:
        z = logits_tile(
            h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features, ROWS, COLS,
            DEPTH, DOT, ACC, SCALE, SOFTCAP,
        )  # fmt: skip
        label = tl.load(labels + rows, mask=rows < count, other=0).to(tl.int64)
        upstream = load_as(grad + rows, rows < count, ACC)
        upstream = tl.where((label >= 0) & (label < vocabulary), upstream, float("nan"))
        q = tl.exp(z - load_as(lse + rows, rows < count, ACC)[:, None])
        q = (q - tl.where(cols[None, :] == label[:, None], 1.0, 0.0)) * upstream[:, None]
        if SCALE != 1.0 or SOFTCAP != 0.0:
            q = q * chain(z, SCALE, SOFTCAP)
        inside = (rows < count)[:, None] & (cols < end)[None, :]
        store_as(p + rows[:, None] * p_r + (cols - begin)[None, :], q, inside)


@triton.jit
def d_weight_kernel(
    p, h, kept, d_weight, d_bias, p_r, h_r, h_d, features, begin, size, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows begin ... begin + size of `P^T h`; tiles past the last column of features, the bias gradient's."""
    task = program(0)
    rows = span(task // col_tiles * ROWS, ROWS)
    count = tl.load(kept).to(tl.int64)
    tile = task % col_tiles
    if tile * COLS < features:
        cols = span(tile * COLS, COLS)
        acc = tl.zeros((ROWS, COLS), dtype=ACC)
        acc = add_product(acc, p, 1, p_r, rows, size, h, h_d, h_r, cols, features, count, DEPTH, DOT)
        inside = (rows < size)[:, None] & (cols < features)[None, :]
        store_as(d_weight + (begin + rows)[:, None] * features + cols[None, :], acc, inside)
    elif d_bias is not None:
        k = tl.arange(0, DEPTH).to(tl.int64)
        sums = tl.zeros((DEPTH, ROWS), dtype=ACC)
        for start in range(0, count, DEPTH):
            at = p + (start + k)[:, None] * p_r + rows[None, :]
            sums += load_as(at, (k < count - start)[:, None] & (rows < size)[None, :], ACC)
        store_as(d_bias + begin + rows, tl.sum(sums, axis=0), rows < size)


@triton.jit
def d_h_kernel(
    p, weight, kept, d_h, p_r, w_v, w_d, features, begin, size, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d_h += P weight[begin: begin + size]; d_h is contiguous, in the accumulation type."""
    task = program(0)
    rows, cols = span(task // col_tiles * ROWS, ROWS), span(task % col_tiles * COLS, COLS)
    count = tl.load(kept).to(tl.int64)
    if task // col_tiles * ROWS < count:
        acc = tl.zeros((ROWS, COLS), dtype=ACC)
        acc = add_product(
            acc, p, p_r, 1, rows, count, weight + begin * w_v, w_d, w_v, cols, features, size, DEPTH, DOT
        )
        inside = (rows < count)[:, None] & (cols < features)[None, :]
        at = d_h + rows[:, None] * features + cols[None, :]
        tl.store(at, acc + load_as(at, inside, ACC), mask=inside)


class Rows(NamedTuple):
    """The head's inputs with the rows that count in front. `kept`, their number, is on the device."""

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    order: Tensor
    kept: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """What is accumulated in."""
        return torch.float64 if self.h.dtype == torch.float64 else torch.float32

    def logits(self) -> tuple[Any, ...]:
        """Strides, vocabulary and features, as the kernels take them."""
        stride = 0 if self.bias is None else self.bias.stride(0)
        return *self.h.stride(), *self.weight.stride(), stride

    def scatter(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Gathered rows back in their places."""
        out = torch.empty_like(rows)
        out[self.order] = rows
        return out.view(shape)


def gathered(h: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int) -> Rows:
    """The rows in front whose label is not `ignore_index`, the others behind them."""
    flat = labels.reshape(-1)
    ignored = flat == ignore_index
    order = ignored.to(torch.uint8).argsort(stable=True)
    rows = h.reshape(-1, h.shape[-1])[order] if flat.numel() else h.reshape(0, h.shape[-1])
    return Rows(rows, weight, bias, flat[order], order, flat.numel() - ignored.sum())


def logits_block(rows: int, cols: int, depth: int, dot: tl.dtype) -> Tile:
    """The block of a program that holds logits and their exponentials: narrow, for both in registers."""
    tile = tile_for(rows, cols, depth, dot)
    narrow = min(tile.cols, 32 if dot == tl.float64 else 64)
    return tile._replace(cols=narrow, num_warps=8 if tile.rows == 128 else 4)


def linear_nll_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    room: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator: h (*, d), weight (V, d), bias (V,), labels (*) -> (nll, lse), both (*), and no logits kept.

    Scratch: a copy of h and `12 N splits` bytes (24 for float64), with at most 1024 / (N / block) splits.
    """
    x = gathered(h, weight, bias, labels, ignore_index)
    (n, d), vocabulary = x.h.shape, weight.shape[0]
    nll, lse = (h.new_empty(n, dtype=x.dtype) for _ in range(2))
    dot = dot_dtype(h, weight)
    tile = logits_block(n, vocabulary, d, dot)
    blocks, tiles = triton.cdiv(n, tile.rows), triton.cdiv(vocabulary, tile.cols)
    split_cols = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // max(blocks, 1)))) * tile.cols
    splits = triton.cdiv(vocabulary, split_cols)
    parts = h.new_empty(3, splits, n, dtype=x.dtype)
    acc = acc_dtype(dot)
    if n > 0:
        with on_device(h):
            parts_kernel[(blocks * splits,)](
                x.h, weight, bias, x.labels, x.kept, *parts, *x.logits(), n, vocabulary, d, splits,
                split_cols, tile.rows, tile.cols, tile.depth, dot, acc, scale, softcap, **tile.launch(),
            )  # fmt: skip
            merge_kernel[(triton.cdiv(n, 128),)](
                *parts, x.labels, x.kept, nll, lse, n, vocabulary, splits, 128, acc, **launch_options()
            )
    return x.scatter(nll, labels.shape), x.scatter(lse, labels.shape), h.new_zeros(room, dtype=x.dtype)


def linear_nll_backward(
    grad: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    kept: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    need_h: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator: gradients of sum(grad nll) in their tensors' dtypes; empty if not needed.

    Scratch: a copy of h, d_h in the accumulation type, and 64 MB of P (at least 512 columns).
    """
    x = gathered(h, weight, bias, labels, ignore_index)
    n, (vocabulary, d) = x.h.shape[0], weight.shape
    upstream, lses = (t.reshape(-1)[x.order] for t in (grad, lse))
    d_h = x.h.new_zeros((n, d) if need_h else (0,), dtype=x.dtype)
    d_weight = weight.new_zeros(vocabulary if need_weight else 0, d)
    d_bias = None if bias is None else bias.new_zeros(vocabulary)
    # fp16 would overflow on a large upstream gradient, so its P is kept in fp32.
    dot = dot_dtype(h, weight)
    p_dtype = torch.bfloat16 if dot == tl.bfloat16 else x.dtype
    columns = min(vocabulary, max(512, _BLOCK_BYTES // (p_dtype.itemsize * max(n, 1)) // 128 * 128))
    p = h.new_empty(n, columns, dtype=p_dtype)
    if n > 0 and d > 0:
        with on_device(h):
            for begin in range(0, vocabulary, columns):
                size = min(columns, vocabulary - begin)
                _probabilities(x, upstream, lses, p, begin, size, scale, softcap)
                add_gradients(
                    x, p, d_h if need_h else None, d_weight if need_weight else None, d_bias, begin, size
                )
    d_h = x.scatter(d_h.to(h.dtype), h.shape) if need_h else h.new_empty(0)
    return d_h, d_weight, weight.new_empty(0) if d_bias is None else d_bias


def _probabilities(
    x: Rows, grad: Tensor, lse: Tensor, p: Tensor, begin: int, size: int, scale: float, softcap: float
) -> None:
    (n, d), vocabulary = x.h.shape, x.weight.shape[0]
    dot = dot_dtype(x.h, x.weight)
    tile = logits_block(n, size, d, dot)
    col_tiles = triton.cdiv(size, tile.cols)
    probabilities_kernel[(triton.cdiv(n, tile.rows) * col_tiles,)](
        x.h, x.weight, x.bias, x.labels, x.kept, grad, lse, p, *x.logits(), vocabulary, d, begin,
        begin + size, p.stride(0), col_tiles, tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot),
        scale, softcap, **tile.launch(),
    )  # fmt: skip


def add_gradients(
    x: Rows,
    p: Tensor,
    d_h: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    begin: int,
    size: int,
) -> None:
    """What the columns from `begin` on give to each gradient that is wanted."""
    n, d = x.h.shape
    if d_weight is not None or d_bias is not None:
        dot = dot_dtype(p, x.h)
        tile = tile_for(size, d, n, dot)
        # Without d_weight its columns are as good as absent, and the bias tile is the first.
        features = d if d_weight is not None else 0
        col_tiles = triton.cdiv(features, tile.cols) + (d_bias is not None)
        d_weight_kernel[(triton.cdiv(size, tile.rows) * col_tiles,)](
            p, x.h, x.kept, d_weight, d_bias, p.stride(0), *x.h.stride(), features, begin, size, col_tiles,
            tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot), **tile.launch(),
        )  # fmt: skip
    if d_h is not None:
        dot = dot_dtype(p, x.weight)
        tile = tile_for(n, d, size, dot)
        col_tiles = triton.cdiv(d, tile.cols)
        d_h_kernel[(triton.cdiv(n, tile.rows) * col_tiles,)](
            p, x.weight, x.kept, d_h, p.stride(0), *x.weight.stride(), d, begin, size, col_tiles,
            tile.rows, tile.cols, tile.depth, dot, acc_dtype(dot), **tile.launch(),
        )  # fmt: skip


def linear_nll_sweep(
    weights: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float,
    softcap: float,
    need_weight: bool,
    bounds: Tensor | None = None,
    beta: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator: both directions one after the other, which on this device costs the logits twice."""
    settings = ignore_index, scale, softcap
    nll, lse, kept = linear_nll_forward(h, weight, bias, labels, *settings, 0)
    slopes = weights if bounds is None else preference_slopes(weights, nll, bounds, beta)
    d_h, d_weight, d_bias = linear_nll_backward(
        slopes, h, weight, bias, labels, lse, kept, *settings, True, need_weight
    )
    return nll, d_h, d_weight, d_bias if need_weight else d_bias[:0].clone()


_ALIGNED: Final = ("features", "vocabulary", "h_r", "w_v", "p_r", "begin", "size", "split_cols", "rows_all")


def aot_case(kernel: Any, tile: Tile, dot: tl.dtype, pointers: dict[str, str], **constants: Any) -> AotCase:
    """A kernel on contiguous, aligned operands, at the tile of a large head."""
    names = kernel.arg_names
    fixed: dict[str, Any] = {
        "h_d": 1,
        "w_d": 1,
        "b_v": 1,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
    }
    fixed |= {"DOT": dot, "ACC": acc_dtype(dot), "SCALE": 1.0, "SOFTCAP": 0.0, **constants}
    return AotCase(
        kernel,
        {
            name: kind
            for name, kind in pointers.items()
            if name in names and constants.get(name, kind) is not None
        },
        {name: value for name, value in fixed.items() if name in names},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=tuple(name for name in _ALIGNED if name in names),
        tensor_cores=dot.primitive_bitwidth == 16,
    )


def _cases(dtype: str) -> tuple[AotCase, ...]:
    dot = DTYPES[dtype]
    acc = str(acc_dtype(dot))
    pointers = dict.fromkeys(("h", "weight", "bias", "d_weight", "d_bias"), dtype)
    pointers |= dict.fromkeys(("peaks", "masses", "picked", "lse", "grad", "d_h"), acc)
    pointers |= {"labels": "i64", "kept": "i64", "p": "bf16" if dtype == "bf16" else acc}
    logits, product = logits_block(1024, 4096, 1024, dot), tile_for(1024, 4096, 1024, dot)
    return (
        aot_case(parts_kernel, logits, dot, pointers),
        aot_case(probabilities_kernel, logits, dot, pointers, bias=None, SCALE=2.0, SOFTCAP=30.0),
        aot_case(d_weight_kernel, product, dot, pointers),
        aot_case(d_h_kernel, product, dot, pointers),
    )


def _merge_case(acc: tl.dtype) -> AotCase:
    pointers = dict.fromkeys(("peaks", "masses", "picked", "nll", "lse"), str(acc))
    return AotCase(merge_kernel, {**pointers, "labels": "i64", "kept": "i64"}, {"ROWS": 128, "ACC": acc})


AOT: Final = (
    *(case for dtype in ("fp32", "bf16", "fp64") for case in _cases(dtype)),
    *(_merge_case(acc) for acc in (tl.float32, tl.float64)),
)

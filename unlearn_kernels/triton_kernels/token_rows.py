"""Statistics of a head's rows, and distances to those of a reference, without logits in memory.

As in `token_loss`: rows that count are gathered to the front; a program reduces a block of rows over a part of the
vocabulary, and the parts, some numbers a row, are merged in float64. The label's own logit is left out of the sums
and joins them at the end. Backward forms the gradient to a block of logits from a few coefficients a row, and hands
it to the products of `token_loss`.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.token_rows import FIELDS, PAIR, SOFTPLUS, STATS
from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    Tile,
    acc_dtype,
    dot_dtype,
    load_as,
    lse_shift,
    on_device,
    program,
    span,
    store_as,
)
from unlearn_kernels.triton_kernels.row_fields import coefficients, fields_of
from unlearn_kernels.triton_kernels.token_loss import (
    _BLOCK_BYTES,
    _PROGRAMS,
    Rows,
    add_gradients,
    aot_case,
    chain,
    gathered,
    logits_block,
    logits_tile,
)

# Numbers that a part leaves of a row.
STAT_PARTS: Final = 8
PAIR_PARTS: Final = 10


@triton.jit
def moved(peak, mass, first, second, to):
    """Sums of e^(z - peak) times powers of z - peak, about another peak."""
    by = lse_shift(peak) - lse_shift(to)
    factor = tl.exp(by)
    return mass * factor, (first + by * mass) * factor, (second + by * (2.0 * first + by * mass)) * factor


@triton.jit
def weighted(e, x):
    """`sum e x` along columns, 0 where e is."""
    return tl.sum(tl.where(e == 0.0, 0.0, e * x), axis=1)


@triton.jit
def stat_parts_kernel(
    h, weight, bias, labels, kept, parts, h_r, h_d, w_v, w_d, b_v, rows_all, vocabulary, features, splits,
    split_cols, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """parts[which, split, row]: label's logit, peak, second, index, mass, first, square; sum of all logits."""
    task = program(0)
    split, rows = task % splits, span(task // splits * ROWS, ROWS)
    count = tl.load(kept).to(tl.int64)
    if task // splits * ROWS < count:
        label = tl.load(labels + rows, mask=rows < count, other=-1).to(tl.int64)
        top = tl.full((ROWS,), float("-inf"), dtype=ACC)
        second = tl.full((ROWS,), float("-inf"), dtype=ACC)
        index = tl.zeros((ROWS,), dtype=ACC)
        mass = tl.zeros((ROWS,), dtype=ACC)
        first = tl.zeros((ROWS,), dtype=ACC)
        square = tl.zeros((ROWS,), dtype=ACC)
        total = tl.zeros((ROWS,), dtype=ACC)
        found = tl.zeros((ROWS,), dtype=ACC)
        for start in range(split * split_cols, tl.minimum((split + 1) * split_cols, vocabulary), COLS):
            cols = span(start, COLS)
            z = logits_tile(
                h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features, ROWS, COLS,
                DEPTH, DOT, ACC, SCALE, SOFTCAP,
            )  # fmt: skip
            own = cols[None, :] == label[:, None]
            found += tl.sum(tl.where(own, z, 0.0), axis=1)
            total += tl.sum(tl.where((cols < vocabulary)[None, :], z, 0.0), axis=1)
            z = tl.where(own, float("-inf"), z)
            peak = tl.max(z, axis=1)
            at = tl.min(tl.where(z == peak[:, None], cols[None, :], vocabulary), axis=1)
            runner = tl.max(tl.where(cols[None, :] == at[:, None], float("-inf"), z), axis=1)
            second = tl.where(peak > top, tl.maximum(top, runner), tl.maximum(second, peak))
            index = tl.where(peak > top, at.to(ACC), index)
            joint = tl.maximum(top, peak)
            below = z - lse_shift(joint)[:, None]
            e = tl.exp(below)
            mass, first, square = moved(top, mass, first, square, joint)
            mass += tl.sum(e, axis=1)
            first += weighted(e, below)
            square += weighted(e, below * below)
            top = joint
        inside = rows < count
        at_row = parts + split * rows_all + rows
        field = splits * rows_all
        tl.store(at_row, found, mask=inside)
        tl.store(at_row + field, top, mask=inside)
        tl.store(at_row + 2 * field, second, mask=inside)
        tl.store(at_row + 3 * field, index, mask=inside)
        tl.store(at_row + 4 * field, mass, mask=inside)
        tl.store(at_row + 5 * field, first, mask=inside)
        tl.store(at_row + 6 * field, square, mask=inside)
        tl.store(at_row + 7 * field, total, mask=inside)


@triton.jit
def pair_parts_kernel(
    h, weight, bias, ref_h, ref_weight, ref_bias, labels, kept, parts, h_r, h_d, w_v, w_d, b_v, q_r, q_d, r_v,
    r_d, c_v, rows_all, vocabulary, features, ref_features, splits, split_cols, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """parts[which, split, row]: labels' logits; peak, mass, sum p z and sum p (z - r); the same of the reference."""
    task = program(0)
    split, rows = task % splits, span(task // splits * ROWS, ROWS)
    count = tl.load(kept).to(tl.int64)
    if task // splits * ROWS < count:
        label = tl.load(labels + rows, mask=rows < count, other=-1).to(tl.int64)
        zeros = tl.zeros((ROWS,), dtype=ACC)
        p_peak = tl.full((ROWS,), float("-inf"), dtype=ACC)
        q_peak = tl.full((ROWS,), float("-inf"), dtype=ACC)
        found, ref_found, p_mass, p_first, p_gap = zeros, zeros, zeros, zeros, zeros
        q_mass, q_first, q_gap = zeros, zeros, zeros
        for start in range(split * split_cols, tl.minimum((split + 1) * split_cols, vocabulary), COLS):
            cols = span(start, COLS)
            z = logits_tile(
                h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features, ROWS, COLS,
                DEPTH, DOT, ACC, SCALE, SOFTCAP,
            )  # fmt: skip
            r = logits_tile(
                ref_h, q_r, q_d, rows, count, ref_weight, r_v, r_d, ref_bias, c_v, cols, vocabulary,
                ref_features, ROWS, COLS, DEPTH, DOT, ACC, SCALE, SOFTCAP,
            )  # fmt: skip
            own = cols[None, :] == label[:, None]
            found += tl.sum(tl.where(own, z, 0.0), axis=1)
            ref_found += tl.sum(tl.where(own, r, 0.0), axis=1)
            z, r = tl.where(own, float("-inf"), z), tl.where(own, float("-inf"), r)
            z_joint = tl.maximum(p_peak, tl.max(z, axis=1))
            r_joint = tl.maximum(q_peak, tl.max(r, axis=1))
            p_by = tl.exp(lse_shift(p_peak) - lse_shift(z_joint))
            q_by = tl.exp(lse_shift(q_peak) - lse_shift(r_joint))
            p_mass, p_first, _ = moved(p_peak, p_mass, p_first, p_first, z_joint)
            q_mass, q_first, _ = moved(q_peak, q_mass, q_first, q_first, r_joint)
            below, ref_below = z - lse_shift(z_joint)[:, None], r - lse_shift(r_joint)[:, None]
            e, f = tl.exp(below), tl.exp(ref_below)
            p_mass += tl.sum(e, axis=1)
            q_mass += tl.sum(f, axis=1)
            p_first += weighted(e, below)
            q_first += weighted(f, ref_below)
            p_gap = p_gap * p_by + weighted(e, z - r)
            q_gap = q_gap * q_by + weighted(f, r - z)
            p_peak, q_peak = z_joint, r_joint
        inside = rows < count
        at_row = parts + split * rows_all + rows
        field = splits * rows_all
        tl.store(at_row, found, mask=inside)
        tl.store(at_row + field, ref_found, mask=inside)
        tl.store(at_row + 2 * field, p_peak, mask=inside)
        tl.store(at_row + 3 * field, p_mass, mask=inside)
        tl.store(at_row + 4 * field, p_first, mask=inside)
        tl.store(at_row + 5 * field, p_gap, mask=inside)
        tl.store(at_row + 6 * field, q_peak, mask=inside)
        tl.store(at_row + 7 * field, q_mass, mask=inside)
        tl.store(at_row + 8 * field, q_first, mask=inside)
        tl.store(at_row + 9 * field, q_gap, mask=inside)


@triton.jit
def reference_tile(
    ref_h, q_r, q_d, rows, count, ref_weight, r_v, r_d, ref_bias, c_v, cols, vocabulary, ref_features,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """The reference's logits, or an offset for each."""
    if ref_h is not None:
        r = logits_tile(
            ref_h, q_r, q_d, rows, count, ref_weight, r_v, r_d, ref_bias, c_v, cols, vocabulary, ref_features,
            ROWS, COLS, DEPTH, DOT, ACC, SCALE, SOFTCAP,
        )  # fmt: skip
    else:
        r = tl.full((ROWS, COLS), OFFSET, dtype=ACC)
    return r


@triton.jit
def softplus_parts_kernel(
    h, weight, bias, ref_h, ref_weight, ref_bias, kept, parts, h_r, h_d, w_v, w_d, b_v, q_r, q_d, r_v, r_d, c_v,
    rows_all, vocabulary, features, ref_features, splits, split_cols, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    BETA: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """parts[split, row] = sum over its words of softplus(BETA (z - r))."""
    task = program(0)
    split, rows = task % splits, span(task // splits * ROWS, ROWS)
    count = tl.load(kept).to(tl.int64)
    if task // splits * ROWS < count:
        sums = tl.zeros((ROWS,), dtype=ACC)
        for start in range(split * split_cols, tl.minimum((split + 1) * split_cols, vocabulary), COLS):
            cols = span(start, COLS)
            z = logits_tile(
                h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features, ROWS, COLS,
                DEPTH, DOT, ACC, SCALE, SOFTCAP,
            )  # fmt: skip
            r = reference_tile(
                ref_h, q_r, q_d, rows, count, ref_weight, r_v, r_d, ref_bias, c_v, cols, vocabulary,
                ref_features, ROWS, COLS, DEPTH, DOT, ACC, SCALE, SOFTCAP, OFFSET,
            )  # fmt: skip
            x = BETA * (z - r)
            u = tl.exp(-tl.abs(x))
            # log(1 + u) loses a small u beside 1: there it is u - u^2 / 2.
            term = tl.maximum(x, 0.0) + tl.where(u < 1e-4, u - 0.5 * u * u, tl.log(1.0 + u))
            sums += tl.sum(tl.where((cols < vocabulary)[None, :], term, 0.0), axis=1)
        tl.store(parts + split * rows_all + rows, sums, mask=rows < count)


@triton.jit
def gradient_kernel(
    h, weight, bias, ref_h, ref_weight, ref_bias, labels, marks, kept, slopes, p, h_r, h_d, w_v, w_d, b_v, q_r,
    q_d, r_v, r_d, c_v, rows_all, vocabulary, features, ref_features, begin, end, p_r, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, BETA: tl.constexpr, OFFSET: tl.constexpr,
    LOGISTIC: tl.constexpr,
):  # fmt: skip
    """P[row, column - begin], the gradient to logits, from the rows' coefficients (`row_fields.COEFFICIENTS`)."""
    task = program(0)
    rows, cols = span(task // col_tiles * ROWS, ROWS), begin + span(task % col_tiles * COLS, COLS)
    count = tl.load(kept).to(tl.int64)
    if task // col_tiles * ROWS < count:
        inside = rows < count
        z = logits_tile(
            h, h_r, h_d, rows, count, weight, w_v, w_d, bias, b_v, cols, vocabulary, features, ROWS, COLS,
            DEPTH, DOT, ACC, SCALE, SOFTCAP,
        )  # fmt: skip
        a = load_as(slopes + 4 * rows_all + rows, inside, ACC)[:, None]
        if LOGISTIC:
            r = reference_tile(
                ref_h, q_r, q_d, rows, count, ref_weight, r_v, r_d, ref_bias, c_v, cols, vocabulary,
                ref_features, ROWS, COLS, DEPTH, DOT, ACC, SCALE, SOFTCAP, OFFSET,
            )  # fmt: skip
            g = a * BETA / (1.0 + tl.exp(BETA * (r - z)))
        else:
            lse = load_as(slopes + rows, inside, ACC)[:, None]
            log_p = z - lse - load_as(slopes + rows_all + rows, inside, ACC)[:, None]
            prob = tl.exp(log_p)
            bend = load_as(slopes + 5 * rows_all + rows, inside, ACC)[:, None] * log_p
            g = load_as(slopes + 10 * rows_all + rows, inside, ACC)[:, None] + prob * a
            if ref_h is not None:
                r = reference_tile(
                    ref_h, q_r, q_d, rows, count, ref_weight, r_v, r_d, ref_bias, c_v, cols, vocabulary,
                    ref_features, ROWS, COLS, DEPTH, DOT, ACC, SCALE, SOFTCAP, OFFSET,
                )  # fmt: skip
                ref_lse = load_as(slopes + 2 * rows_all + rows, inside, ACC)[:, None]
                log_q = r - ref_lse - load_as(slopes + 3 * rows_all + rows, inside, ACC)[:, None]
                bend += load_as(slopes + 6 * rows_all + rows, inside, ACC)[:, None] * log_q
                g += load_as(slopes + 7 * rows_all + rows, inside, ACC)[:, None] * tl.exp(log_q)
            g += tl.where(prob == 0.0, 0.0, prob * bend)
            label = tl.load(labels + rows, mask=inside, other=-1).to(tl.int64)
            exact = load_as(slopes + 8 * rows_all + rows, inside, ACC)[:, None]
            g = tl.where(cols[None, :] == label[:, None], exact, g)
            if marks is not None:
                mark = tl.load(marks + rows, mask=inside, other=-1).to(tl.int64)
                more = load_as(slopes + 9 * rows_all + rows, inside, ACC)[:, None]
                g += tl.where(cols[None, :] == mark[:, None], more, 0.0)
        if SCALE != 1.0 or SOFTCAP != 0.0:
            g = g * chain(z, SCALE, SOFTCAP)
        block = inside[:, None] & (cols < end)[None, :]
        store_as(p + rows[:, None] * p_r + (cols - begin)[None, :], g, block)


def row_tile(rows: int, columns: int, features: int, dot: tl.dtype) -> Tile:
    """A block of logits, small enough to leave registers for a second one and for what a row keeps beside them."""
    tile = logits_block(rows, columns, features, dot)
    return tile._replace(cols=max(16, tile.cols // 2), depth=min(tile.depth, 32), num_warps=8, num_stages=2)


class _Call:
    """Gathered rows of a policy and of its reference, and how kernels take them."""

    def __init__(
        self,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_h: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        labels: Tensor | None,
        ignore_index: int,
        scale: float,
        softcap: float,
        kind: int,
        beta: float,
        offset: float,
    ) -> None:
        self.shape = h.shape[:-1]
        self.labelled = labels is not None
        everything = torch.full(self.shape, -1, dtype=torch.long, device=h.device)
        self.x: Rows = gathered(h, weight, bias, everything if labels is None else labels,
                                ignore_index if labels is not None else -2)  # fmt: skip
        self.kind, self.beta, self.offset = kind, beta, offset
        self.logits = {"SCALE": scale, "SOFTCAP": softcap}
        flat = None if ref_h is None else ref_h.reshape(-1, ref_h.shape[-1])
        self.ref_h = None if flat is None else flat[self.x.order]
        self.ref_weight, self.ref_bias = ref_weight, ref_bias
        operands = [t for t in (h, weight, ref_h, ref_weight) if t is not None]
        self.dot = dot_dtype(*operands)

    @property
    def heads(self) -> tuple[Any, ...]:
        """Tensors of both heads."""
        x = self.x
        return x.h, x.weight, x.bias, self.ref_h, self.ref_weight, self.ref_bias

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of both heads; zeros where there is no reference."""
        of_bias = 0 if self.ref_bias is None else self.ref_bias.stride(0)
        if self.ref_h is None or self.ref_weight is None:
            return *self.x.logits(), *[0] * 5
        return *self.x.logits(), *self.ref_h.stride(), *self.ref_weight.stride(), of_bias

    @property
    def features(self) -> tuple[int, int]:
        """Of the policy and of the reference."""
        return self.x.h.shape[1], 0 if self.ref_h is None else self.ref_h.shape[1]

    def tile(self, columns: int) -> Tile:
        """A block of logits."""
        return row_tile(self.x.h.shape[0], columns, self.x.h.shape[1], self.dot)

    def parts(self) -> Tensor:
        """What the parts of the vocabulary leave of every row, (numbers, splits, N)."""
        n, vocabulary, acc = self.x.h.shape[0], self.x.weight.shape[0], acc_dtype(self.dot)
        tile = self.tile(vocabulary)
        blocks, tiles = triton.cdiv(n, tile.rows), triton.cdiv(vocabulary, tile.cols)
        split_cols = triton.cdiv(tiles, max(1, min(tiles, _PROGRAMS // max(blocks, 1)))) * tile.cols
        splits = triton.cdiv(vocabulary, split_cols)
        counts = {STATS: STAT_PARTS, PAIR: PAIR_PARTS, SOFTPLUS: 1}
        parts = self.x.h.new_zeros(counts[self.kind], splits, n, dtype=self.x.dtype)
        if n == 0:
            return parts
        grid, blocked = (blocks * splits,), (tile.rows, tile.cols, tile.depth, self.dot, acc)
        options = {**self.logits, **tile.launch()}
        with on_device(self.x.h):
            if self.kind == STATS:
                stat_parts_kernel[grid](
                    *self.heads[:3], self.x.labels, self.x.kept, parts, *self.x.logits(), n, vocabulary,
                    self.features[0], splits, split_cols, *blocked, **options,
                )  # fmt: skip
            elif self.kind == PAIR:
                pair_parts_kernel[grid](
                    *self.heads, self.x.labels, self.x.kept, parts, *self.strides, n, vocabulary, *self.features,
                    splits, split_cols, *blocked, **options,
                )  # fmt: skip
            else:
                softplus_parts_kernel[grid](
                    *self.heads, self.x.kept, parts, *self.strides, n, vocabulary, *self.features, splits,
                    split_cols, *blocked, BETA=self.beta, OFFSET=self.offset, **options,
                )  # fmt: skip
        return parts

    def gradient(self, slopes: Tensor, marks: Tensor | None, p: Tensor, begin: int, size: int) -> None:
        """The gradient to the logits of the words from `begin` on."""
        n, vocabulary = self.x.h.shape[0], self.x.weight.shape[0]
        tile = self.tile(size)
        col_tiles = triton.cdiv(size, tile.cols)
        gradient_kernel[(triton.cdiv(n, tile.rows) * col_tiles,)](
            *self.heads, self.x.labels, marks, self.x.kept, slopes, p, *self.strides, n, vocabulary, *self.features,
            begin, begin + size, p.stride(0), col_tiles, tile.rows, tile.cols, tile.depth, self.dot,
            acc_dtype(self.dot), BETA=self.beta, OFFSET=self.offset, LOGISTIC=self.kind == SOFTPLUS,
            **self.logits, **tile.launch(),
        )  # fmt: skip


def linear_rows_forward(*args: Any) -> tuple[Tensor, Tensor]:
    """The raw operator: fields (F, *) and the most likely words.

    Scratch: a copy of h, and 8 to 10 numbers for each row and split, with at most 1024 / (N / block) splits.
    """
    call = _Call(*args)
    x = call.x
    rows, words = fields_of(call.kind, call.parts(), x.labels, x.weight.shape[0], call.beta)
    counts = torch.arange(x.h.shape[0], device=x.h.device) < x.kept
    shape = call.shape
    fields = [x.scatter(torch.where(counts, row, 0.0).to(x.dtype), shape) for row in rows]
    argmax = torch.zeros(0, dtype=torch.long, device=x.h.device)
    if call.kind == STATS:
        argmax = x.scatter(torch.where(counts, words, 0), shape)
    return torch.stack(fields), argmax


def linear_rows_backward(
    upstream: Tensor, fields: Tensor, argmax: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator: gradients of sum(upstream fields) in their tensors' dtypes; empty if not needed.

    Scratch: that of `linear_nll_backward`, and 11 numbers a row.
    """
    *inputs, need_h, need_weight = args
    call = _Call(*inputs)
    x = call.x
    n, (vocabulary, d) = x.h.shape[0], x.weight.shape
    up, values = (t.reshape(len(FIELDS[call.kind]), -1)[:, x.order] for t in (upstream, fields))
    slopes = coefficients(call.kind, values, up, x.labels, vocabulary, call.beta).to(x.dtype).contiguous()
    marks = argmax.reshape(-1)[x.order] if call.kind == STATS else None
    d_h = x.h.new_zeros((n, d) if need_h else (0,), dtype=x.dtype)
    d_weight = x.weight.new_zeros(vocabulary if need_weight else 0, d)
    has_bias = x.bias is not None and need_weight
    d_bias = x.bias.new_zeros(vocabulary) if x.bias is not None and need_weight else None
    # fp16 would overflow on a large upstream gradient, so its P is kept in fp32.
    p_dtype = torch.bfloat16 if call.dot == tl.bfloat16 else x.dtype
    columns = min(vocabulary, max(512, _BLOCK_BYTES // (p_dtype.itemsize * max(n, 1)) // 128 * 128))
    p = x.h.new_empty(n, columns, dtype=p_dtype)
    if n > 0 and d > 0:
        with on_device(x.h):
            for begin in range(0, vocabulary, columns):
                size = min(columns, vocabulary - begin)
                call.gradient(slopes, marks, p, begin, size)
                wanted = d_h if need_h else None, d_weight if need_weight else None, d_bias
                add_gradients(x, p, *wanted, begin, size)
    d_h = x.scatter(d_h.to(x.h.dtype), torch.Size((*call.shape, d))) if need_h else x.h.new_empty(0)
    empty = (x.weight if x.bias is None else x.bias).new_empty(0)
    return d_h, d_weight, d_bias if has_bias and d_bias is not None else empty


def linear_rows_sweep(upstream: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The raw operator: both directions one after the other, which on this device costs the logits twice."""
    *inputs, need_weight = args
    fields, argmax = linear_rows_forward(*inputs)
    return fields, argmax, *linear_rows_backward(upstream, fields, argmax, *inputs, True, need_weight)


def _cases(dtype: str) -> tuple[AotCase, ...]:
    dot = DTYPES[dtype]
    acc = str(acc_dtype(dot))
    pointers = dict.fromkeys(("h", "weight", "bias", "ref_h", "ref_weight", "ref_bias"), dtype)
    pointers |= dict.fromkeys(("parts", "slopes"), acc) | dict.fromkeys(("labels", "marks", "kept"), "i64")
    pointers |= {"p": "bf16" if dtype == "bf16" else acc}
    tile = row_tile(1024, 4096, 1024, dot)
    more = {"q_d": 1, "r_d": 1, "c_v": 1, "BETA": 0.1, "OFFSET": 0.0}
    return (
        aot_case(stat_parts_kernel, tile, dot, pointers),
        aot_case(pair_parts_kernel, tile, dot, pointers, **more, SCALE=2.0, SOFTCAP=30.0),
        aot_case(softplus_parts_kernel, tile, dot, pointers, **more),
        aot_case(gradient_kernel, tile, dot, pointers, **more, ref_h=None, ref_weight=None, ref_bias=None,
                 LOGISTIC=False),
        aot_case(gradient_kernel, tile, dot, pointers, **more, marks=None, LOGISTIC=False, SOFTCAP=30.0),
        aot_case(gradient_kernel, tile, dot, pointers, **more, marks=None, LOGISTIC=True),
    )  # fmt: skip


AOT: Final = tuple(case for dtype in ("fp32", "bf16", "fp64") for case in _cases(dtype))

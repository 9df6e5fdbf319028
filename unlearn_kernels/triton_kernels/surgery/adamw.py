"""AdamW on a weighted sum of gradients that is never in memory: one launch over a table of addresses."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, program, span
from unlearn_kernels.triton_kernels.surgery.masks import load_one
from unlearn_kernels.triton_kernels.surgery.sums import TABLE_TYPES, blocks, bounds, load_rows, store_row
from unlearn_kernels.triton_kernels.surgery.tables import (
    Table,
    addresses_of,
    copy_back,
    made_dense,
    moved,
    refuse_overlap,
    table_of,
)


@triton.jit
def power(base, exponent):
    """base ** exponent in float64."""
    return tl.where(base > 0, tl.exp(exponent * tl.log(tl.where(base > 0, base, 1.0))), 0.0)


@triton.jit
def finite_weights(weights, TERMS: tl.constexpr, ROWS: tl.constexpr):
    """The weights, and whether all are finite."""
    row = tl.arange(0, ROWS)
    w = tl.load(weights + row, mask=row < TERMS, other=0.0).to(tl.float64)
    odd = tl.sum((((w - w) == 0) == 0).to(tl.int32), axis=0)
    return w, odd == 0


@triton.jit
def count_kernel(weights, steps, wide, count, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Adds one to every step, float32 or (wide) float64, unless a weight is not finite."""
    _, fine = finite_weights(weights, TERMS, ROWS)
    if fine:
        at = span(program(0) * BLOCK, BLOCK)
        base = tl.load(steps + at, mask=at < count, other=0).to(tl.int64)
        is_wide = tl.load(wide + at, mask=at < count, other=0).to(tl.int32)
        single = base.to(tl.pointer_type(tl.float32))
        mine = (at < count) & (is_wide == 0)
        tl.store(single, tl.load(single, mask=mine, other=0.0).to(tl.float32) + 1, mask=mine)
        double = base.to(tl.pointer_type(tl.float64))
        mine = (at < count) & (is_wide != 0)
        tl.store(double, tl.load(double, mask=mine, other=0.0).to(tl.float64) + 1, mask=mine)


@triton.jit
def round_at_random(x, at, seed, place, step):
    """float32 to a bfloat16 below or above, as float32; counter (at / 8, its upper half, place, step)."""
    counter = at // 8
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, zero + place.to(tl.uint32), zero + step.to(tl.uint32))
    word = (at % 8) // 2
    bits = tl.where(word == 0, w0, tl.where(word == 1, w1, tl.where(word == 2, w2, w3)))
    half = tl.where(at % 2 == 0, bits & 0xFFFF, bits >> 16)
    pattern = x.to(tl.uint32, bitcast=True)
    rounded = ((pattern + half) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((pattern & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def adamw_kernel(
    addresses, codes, positions, starts, stops, segments, weights, groups, group_of, steps, wide, places, count,
    seed, TERMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr,
    SUM: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """One chunk of one parameter. Gradients are summed in SUM, the step is made in ACC."""
    w, fine = finite_weights(weights, TERMS, ROWS)
    if fine:
        task = program(0)
        position = tl.load(positions + task).to(tl.int64)
        start, stop = bounds(starts, stops, task, ALIGNED)
        group = groups + tl.load(group_of + position).to(tl.int64) * 6
        lr, beta1 = tl.load(group).to(tl.float64), tl.load(group + 1).to(tl.float64)
        beta2, eps = tl.load(group + 2).to(tl.float64), tl.load(group + 3).to(tl.float64)
        decay, sign = tl.load(group + 4).to(tl.float64), tl.load(group + 5).to(tl.float64)
        counted = tl.load(steps + position).to(tl.int64)
        is_wide = tl.load(wide + position).to(tl.int32)
        single = counted.to(tl.pointer_type(tl.float32))
        double = counted.to(tl.pointer_type(tl.float64))
        step = tl.load(single, mask=is_wide == 0, other=0.0).to(tl.float64)
        step += tl.load(double, mask=is_wide != 0, other=0.0).to(tl.float64)
        size = (lr / (1.0 - power(beta1, step))).to(ACC)
        root = (1.0 / tl.sqrt(1.0 - power(beta2, step))).to(ACC)
        kept = (1.0 - lr * decay).to(ACC)
        row = tl.arange(0, ROWS).to(tl.int64)
        base = tl.load(addresses + (3 + row) * count + position, mask=row < TERMS, other=0).to(tl.int64)
        code = tl.load(codes + (3 + row) * count + position, mask=row < TERMS, other=-1).to(tl.int32)
        code = tl.where(w == 0, -1, code)
        p_at, p_code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
        m_at = tl.load(addresses + count + position).to(tl.int64)
        m_code = tl.load(codes + count + position).to(tl.int32)
        v_at = tl.load(addresses + 2 * count + position).to(tl.int64)
        v_code = tl.load(codes + 2 * count + position).to(tl.int32)
        for offset in range(0, stop - start, BLOCK):
            at = span(start + offset, BLOCK)
            inside = at < stop
            x = load_rows(base, code, at, inside, TYPES, ROWS, BLOCK, SUM, ALIGNED)
            g = tl.sum(x * (sign * w).to(SUM)[:, None], axis=0).to(ACC)
            p = load_one(p_at, p_code, at, inside, TYPES, ACC, ALIGNED)
            m = load_one(m_at, m_code, at, inside, TYPES, ACC, ALIGNED)
            v = load_one(v_at, v_code, at, inside, TYPES, ACC, ALIGNED)
            m = beta1.to(ACC) * m + (1.0 - beta1).to(ACC) * g
            v = beta2.to(ACC) * v + (1.0 - beta2).to(ACC) * g * g
            p = kept * p - size * m / (tl.sqrt(v) * root + eps.to(ACC))
            if STOCHASTIC:
                place = tl.load(places + position).to(tl.int64)
                drawn = round_at_random(p.to(tl.float32), at, seed, place, step.to(tl.int64))
                p = tl.where(p_code == 2, drawn.to(ACC), p)
            store_row(p_at, p_code, at, inside, p, TYPES, ALIGNED)
            store_row(m_at, m_code, at, inside, m, TYPES, ALIGNED)
            store_row(v_at, v_code, at, inside, v, TYPES, ALIGNED)


def _update(
    table: Table, weights: Tensor, groups: Tensor, group_of: Tensor, steps: Tensor, wide: Tensor, stochastic: bool,
    seed: int, exact: bool,
) -> None:  # fmt: skip
    """Counts the steps, at addresses, then the pass. exact: weighted sums in float64."""
    n, terms = len(steps), weights.numel()
    rows, acc = blocks(terms, 1)["ROWS"], tl.float32 if table.single else tl.float64
    with on_device(weights):
        count_kernel[(triton.cdiv(n, 256),)](
            weights, steps, wide, n, TERMS=terms, ROWS=rows, BLOCK=256, **launch_options()
        )
        if table.tasks > 0:
            adamw_kernel[(table.tasks,)](
                *table.tensors(), weights, groups, group_of, steps, wide, moved(range(n), torch.int32, weights.device),
                n, seed, TERMS=terms, ROWS=rows, BLOCK=512, TYPES=table.types, ACC=acc,
                SUM=tl.float64 if exact else acc, ALIGNED=table.aligned, STOCHASTIC=stochastic, **launch_options(),
            )  # fmt: skip


Update = Callable[[Table, Tensor, Tensor, Tensor, Tensor, Tensor, bool, int, bool], None]


def surgical_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Tensor,
    groups: Tensor,
    group_of: Sequence[int],
    stochastic: bool,
    seed: int,
    update: Update = _update,
) -> None:
    """The raw operator `surgical_adamw_`: two launches and no wait for the device."""
    if not params:
        return
    n, device = len(params), params[0].device
    refuse_overlap(params, gradients)
    sets = [gradients[at : at + n] for at in range(0, len(gradients), n)]
    made = made_dense([params, exp_avgs, exp_avg_sqs, *sets])
    table = table_of(made)
    wide = moved([s.dtype == torch.float64 for s in steps], torch.int32, device)
    belongs, at_steps = moved(group_of, torch.int32, device), addresses_of(steps, device)
    exact = any(x.dtype == torch.float32 for x in gradients) or not table.single
    update(table, weights.contiguous(), groups.contiguous(), belongs, at_steps, wide, stochastic, seed, exact)
    for to, copy in zip((params, exp_avgs, exp_avg_sqs), made, strict=False):
        copy_back(to, copy)


def _case(types: int, acc: tl.dtype, total: tl.dtype, stochastic: bool, aligned: bool = True) -> AotCase:
    constants: dict[str, Any] = {
        "TERMS": 2, "ROWS": 2, "BLOCK": 512, "TYPES": types, "ACC": acc, "SUM": total, "ALIGNED": aligned,
        "STOCHASTIC": stochastic,
    }  # fmt: skip
    pointers = {
        **TABLE_TYPES, "weights": "fp64", "groups": "fp64", "group_of": "i32", "steps": "i64", "wide": "i32",
        "places": "i32",
    }  # fmt: skip
    return AotCase(adamw_kernel, pointers, constants)


AOT: Final = (
    AotCase(
        count_kernel,
        {"weights": "fp64", "steps": "i64", "wide": "i32"},
        {"TERMS": 2, "ROWS": 2, "BLOCK": 256},
    ),
    _case(1, tl.float32, tl.float64, False),
    _case(4, tl.float32, tl.float32, False),
    _case(5, tl.float32, tl.float32, True),
    _case(15, tl.float64, tl.float64, False, aligned=False),
)

"""Rules for single elements: one pass, one program a chunk."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.surgery_rules import AGEM, GRADDROP, KEEP_RETAIN, PCGRAD, SKIP_NONFINITE
from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, on_device, program, span
from unlearn_kernels.triton_kernels.surgery.sums import (
    TABLE_TYPES,
    bounds,
    gramians_of,
    load_rows,
    segment_sums,
    store_row,
)  # fmt: skip
from unlearn_kernels.triton_kernels.surgery.tables import TENSOR, Table, copy_back, made_dense, table_of

_BLOCK: Final = 1024


@triton.jit
def uniforms(seed, first, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Numbers in [0, 1) of the elements from `first`, a multiple of 4, on, as `reference.surgery_elements` has them."""
    counter = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    low, high = (counter & 0xFFFFFFFF).to(tl.uint32), (counter >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK)
    return (words >> 8).to(tl.int32).to(ACC) * 5.9604644775390625e-08


@triton.jit
def kept(x, positive, u, leak):
    """x where its sign is drawn, elsewhere multiplied by its leak."""
    chosen = ((x > 0) & (positive > u)) | ((x < 0) & (positive <= u))
    return tl.where(chosen, 1.0, leak).to(x.dtype) * x


@triton.jit
def elements_kernel(
    addresses, codes, positions, starts, stops, segments, firsts, total, numbers, clashes, seed, count,
    BLOCK: tl.constexpr, TYPES: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr, DROP: tl.constexpr,
    DROPS_CLASHES: tl.constexpr, AGREE: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """List 0 = rule(list 0, list 1) over the chunk; clashes[task]: how many signs differ, NaN for a skipped step.

    firsts: the number of each position's first element, for DROP. total: the Gramian of all, for SKIP.
    """
    task = program(0)
    finite = 1
    if SKIP:
        square = tl.load(total + tl.arange(0, 4)).to(tl.float64)
        finite = (tl.sum(square * 0, axis=0) == 0).to(tl.int32)
    tl.store(clashes + task, float("nan"))
    if finite > 0:
        position = tl.load(positions + task).to(tl.int64)
        start, stop = bounds(starts, stops, task, ALIGNED)
        one = tl.arange(0, 1).to(tl.int64)
        f_base = tl.load(addresses + position + one).to(tl.int64)
        r_base = tl.load(addresses + count + position + one).to(tl.int64)
        f_code = tl.load(codes + position + one).to(tl.int32)
        r_code = tl.load(codes + count + position + one).to(tl.int32)
        out, out_code = tl.load(addresses + position).to(tl.int64), tl.load(codes + position).to(tl.int32)
        gamma, alpha = tl.load(numbers).to(tl.float64).to(ACC), tl.load(numbers + 1).to(tl.float64).to(ACC)
        found = tl.zeros((BLOCK,), dtype=tl.int32)
        for offset in range(0, stop - start, BLOCK):
            at = span(start + offset, BLOCK)
            f = load_rows(f_base, f_code, at, at < stop, TYPES, 1, BLOCK, ACC, ALIGNED).reshape(BLOCK)
            r = load_rows(r_base, r_code, at, at < stop, TYPES, 1, BLOCK, ACC, ALIGNED).reshape(BLOCK)
            clash = ((f < 0) & (r > 0)) | ((f > 0) & (r < 0))
            found += clash.to(tl.int32)
            if DROP:
                u = uniforms(seed, tl.load(firsts + position).to(tl.int64) + start + offset, BLOCK, ACC)
                positive = 0.5 + 0.5 * ((f + r) / (tl.abs(f) + tl.abs(r)))
                forget_leak = tl.load(numbers + 7).to(tl.float64).to(ACC)
                retain_leak = tl.load(numbers + 8).to(tl.float64).to(ACC)
                made = kept(f, positive, u, forget_leak) + kept(r, positive, u, retain_leak)
            else:
                agreed = gamma * f
                if AGREE:
                    agreed += alpha * r
                against = r * 0.0 if DROPS_CLASHES else alpha * r
                made = tl.where(clash, against, agreed)
            store_row(out, out_code, at, at < stop, made, TYPES, ALIGNED)
        tl.store(clashes + task, tl.sum(found.to(tl.float64), axis=0))


class ElementRule(NamedTuple):
    """What the kernels do with an element."""

    drop: bool  # by chance
    drops_clashes: bool  # of opposite signs nothing is left, not alpha r
    agree: bool  # alpha r is added where signs agree

    @staticmethod
    def of(rule: int, options: Sequence[float], flags: int) -> "ElementRule":
        """The rule with its numbers and flags."""
        agree = options[1] != 0 and (rule in (AGEM, PCGRAD) or bool(flags & KEEP_RETAIN))
        return ElementRule(rule == GRADDROP, rule == PCGRAD, agree)


def _first_elements(tensors: Sequence[Tensor]) -> Tensor:
    """The number of the first element of each tensor, a multiple of 4."""
    sizes = torch.tensor([(x.numel() + 3) // 4 * 4 for x in tensors])
    return torch.cumsum(sizes, 0) - sizes


def _act(
    table: Table, numbering: Tensor, total: Tensor | None, numbers: Tensor, seed: int, rule: ElementRule
) -> Tensor:
    clashes = torch.empty(1, table.tasks, dtype=torch.float64, device=numbers.device)
    if table.tasks > 0:
        with on_device(clashes):
            elements_kernel[(table.tasks,)](
                *table.tensors(), numbering, numbers if total is None else total, numbers, clashes, seed,
                table.addresses.shape[1], BLOCK=_BLOCK, TYPES=table.types,
                ACC=tl.float32 if table.single else tl.float64, ALIGNED=table.aligned, DROP=rule.drop,
                DROPS_CLASHES=rule.drops_clashes, AGREE=rule.agree, SKIP=total is not None, **launch_options(),
            )  # fmt: skip
    return segment_sums(clashes, table)[:, 0]


# Writes list 0; how many signs of each tensor differ, NaN for a step that is skipped. Takes the numbers of the first
# elements, and the Gramian of all where a step that is not finite is skipped.
Act = Callable[[Table, Tensor, Tensor | None, Tensor, int, ElementRule], Tensor]


def project_elements(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rule: int,
    numbers: Tensor,
    options: Sequence[float],
    flags: int,
    seed: int,
    gramians: Callable[[Table], Tensor] = gramians_of,
    act: Act = _act,
) -> Tensor:
    """Writes `forget`; the share of opposite signs of each tensor. `numbers`: the options on the device."""
    made = made_dense([forget, retain], indexed=rule == GRADDROP)
    table = table_of(made, TENSOR)
    total = gramians(table).sum(0) if flags & SKIP_NONFINITE else None
    numbering = _first_elements(forget).to(numbers.device, non_blocking=True)
    found = act(table, numbering, total, numbers, seed, ElementRule.of(rule, options, flags))
    copy_back(forget, made[0])
    sizes = torch.tensor([max(x.numel(), 1) for x in forget], dtype=torch.float64)
    rates = found / sizes.to(numbers.device, non_blocking=True)
    return rates if total is None else rates + (0 * total).sum()  # NaN for tensors without elements too


def _case(
    types: int, *, drop: bool, aligned: bool = True, skip: bool = False, agree: bool = False
) -> AotCase:
    pointers = {**TABLE_TYPES, "firsts": "i64", "total": "fp64", "numbers": "fp64", "clashes": "fp64"}
    constants = {
        "BLOCK": _BLOCK, "TYPES": types, "ACC": tl.float64 if types & 2 else tl.float32, "ALIGNED": aligned,
        "DROP": drop, "DROPS_CLASHES": False, "AGREE": agree, "SKIP": skip,
    }  # fmt: skip
    return AotCase(elements_kernel, pointers, constants)


AOT: Final = (
    *(_case(types, drop=drop) for types in (1, 4) for drop in (False, True)),
    _case(15, drop=False, aligned=False, skip=True, agree=True),
    _case(15, drop=True, aligned=False),
)

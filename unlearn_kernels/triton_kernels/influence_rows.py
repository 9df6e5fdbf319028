"""Rows as a store keeps them: codes, scales of blocks and squared norms, a program a row.

Compiled with `fusion=False`: a product and a sum that round apart are what gives every backend the same bits.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.influence_rows import LEVELS
from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import launch_options, load_as, on_device, program, span
from unlearn_kernels.triton_kernels.influence_random import word_of

_COLUMNS: Final = 256  # at once, of rows without blocks
_TYPES: Final = {0: torch.uint8, 4: torch.uint8, 8: torch.uint8, 16: torch.bfloat16, 32: torch.float32}


@triton.jit
def random_shift(seed, row, cols):
    """n / 2^16 for each column, n of 16 random bits."""
    half = cols // 2
    word = word_of(seed, row, half, 6)
    return ((word >> ((cols % 2) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32).to(
        tl.float32
    ) * 0.0000152587890625


@triton.jit
def block_codes(x, inside, shift, LEVELS: tl.constexpr):
    """Integers of one block as int32, those of zero outside, and its scale."""
    finite = (x - x) == 0
    odd = tl.sum((finite == 0).to(tl.int32), axis=0)
    size = tl.div_rn(tl.max(tl.where(finite, tl.abs(x), 0.0), axis=0), LEVELS * 1.0)
    scale = tl.where(size < 1.1754943508222875e-38, 0.0, size)
    usable = (odd == 0) & (scale > 0)
    inverse = tl.div_rn(1.0, tl.where(usable, scale, 1.0))
    moved = tl.where(usable & inside, x * inverse, 0.0) + (shift + (LEVELS + 1.0))
    codes = tl.minimum(tl.maximum(moved.to(tl.int32), 1), 2 * LEVELS + 1)
    return codes, tl.where(odd == 0, scale, float("nan"))


@triton.jit
def to_bf16(x):
    """The bits of the nearest bfloat16, which Triton's interpreter would cut off instead."""
    bits = x.to(tl.uint32, bitcast=True)
    nearest = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return tl.where(x == x, nearest, (bits >> 16) | 0x40).to(tl.int16)


@triton.jit
def encode_rows_kernel(
    x, rows, scales, sqnorms, width, columns, blocks, block, seed, first, x_n, x_d, BITS: tl.constexpr,
    LEVELS: tl.constexpr, BLOCK: tl.constexpr, UNBIASED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row, block after block."""
    row = program(0)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    for n in range(0, blocks):
        at = tl.to_tensor(n).to(tl.int64) * block + lane
        inside = (lane < block) & (at < width)
        wide = load_as(x + row * x_n + at * x_d, inside, ACC)
        total += wide.to(tl.float64) * wide.to(tl.float64)
        value = wide.to(tl.float32)
        if BITS == 32:
            tl.store(rows + row * columns + at, value, mask=inside)
        if BITS == 16:
            tl.store(rows + row * columns + at, to_bf16(value), mask=inside)
        if (BITS == 4) | (BITS == 8):
            shift = tl.zeros((BLOCK,), dtype=tl.float32) + 0.5
            if UNBIASED:
                shift = random_shift(seed, first + row, at)
            codes, scale = block_codes(value, inside, shift, LEVELS)
            tl.store(scales + row * blocks + n, scale)
            if BITS == 8:
                tl.store(rows + row * columns + at, codes.to(tl.uint8), mask=inside)
            else:
                even, odd = tl.split(tl.reshape(tl.where(inside, codes, LEVELS + 1), [BLOCK // 2, 2]))
                pair = span(0, BLOCK // 2)
                byte = (tl.to_tensor(n).to(tl.int64) * block) // 2 + pair
                kept = (pair < block // 2) & (byte < columns)
                tl.store(rows + row * columns + byte, (even | (odd << 4)).to(tl.uint8), mask=kept)
    tl.store(sqnorms + row, tl.sum(total, axis=0))


def encode_rows(
    x: Tensor, bits: int, block: int, unbiased: bool, seed: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator: x (n, D), any strides."""
    n, width = x.shape
    coded = bits in LEVELS
    size = block if coded else _COLUMNS
    blocks, columns = triton.cdiv(width, size), {0: 0, 4: (width + 1) // 2}.get(bits, width)
    rows = x.new_empty((n, columns), dtype=_TYPES[bits])
    scales = x.new_empty((n, blocks if coded else 0), dtype=torch.float32)
    sqnorms = x.new_empty((n,), dtype=torch.float64)
    memory = rows.view(torch.int16) if bits == 16 else rows
    if n > 0:
        with on_device(x):
            encode_rows_kernel[(n,)](
                x, memory, scales, sqnorms, width, columns, blocks, size, seed, first, *x.stride(), BITS=bits,
                LEVELS=LEVELS.get(bits, 0), BLOCK=triton.next_power_of_2(size), UNBIASED=unbiased,
                ACC=tl.float64 if x.dtype == torch.float64 else tl.float32, **launch_options(fusion=False),
            )  # fmt: skip
    return rows, scales, sqnorms


def _case(pointer: str, bits: int, unbiased: bool) -> AotCase:
    rows = {0: "u8", 4: "u8", 8: "u8", 16: "i16", 32: "fp32"}[bits]
    return AotCase(
        encode_rows_kernel,
        {"x": pointer, "rows": rows, "scales": "fp32", "sqnorms": "fp64"},
        {"x_d": 1, "BITS": bits, "LEVELS": LEVELS.get(bits, 0), "BLOCK": 128 if bits in LEVELS else _COLUMNS}
        | {"UNBIASED": unbiased, "ACC": tl.float64 if pointer == "fp64" else tl.float32},
        multiples_of_16=("width", "block", "x_n"),
        fusion=False,
    )


AOT: Final = (
    *(_case(pointer, 8, False) for pointer in ("fp32", "fp64", "bf16", "fp16")),
    *(_case("fp32", bits, True) for bits in (4, 8)),
    *(_case("fp32", bits, False) for bits in (0, 4, 16)),
    _case("fp64", 32, False),
)

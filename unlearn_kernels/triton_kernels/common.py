"""What Triton kernels are put together from: loads, tile products, epilogues, random signs, launches.

A kernel is a combination of these parts: where its operands come from (`load_as`, `sign_rows`), the product
(`add_product`) and what happens to the accumulator tile (`square_sum`, `hadamard_sum`, `lse_update`). Rules:

* `tl.load` is followed by `.to(...)`: kernels compute in fp32, fp64, or the type that `dot_dtype` gives.
* Program ids become int64 (`program`) before a stride multiplies them, so that no offset wraps at 2^31.
* No atomics: tiles write partial sums, and `sum_parts` adds them in one order.
* No autotuning: `tile_for` picks from dtype, shape and device, so the same call gives the same bits.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels import configs

_TL_DTYPES: Final = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def dot_dtype(*operands: Tensor) -> tl.dtype:
    """The type in which the operands enter `tl.dot`; its products are exact in the accumulator's type.

    Half types stay as they are, for the tensor cores; operands of two types meet in fp32. The interpreter
    keeps bf16 as raw bits and multiplies those, so there bf16 becomes fp32: the same numbers.
    """
    dtypes = {x.dtype for x in operands}
    if torch.float64 in dtypes:
        return tl.float64
    if len(dtypes) > 1 or (interpreted() and torch.bfloat16 in dtypes):
        return tl.float32
    return _TL_DTYPES[dtypes.pop()]


def acc_dtype(dot: tl.dtype) -> tl.dtype:
    """The type that products of `dot` are accumulated in."""
    return tl.float64 if dot == tl.float64 else tl.float32


class Tile(NamedTuple):
    """A launch configuration: the block of one program and the resources it takes."""

    rows: int
    cols: int
    depth: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of the launch."""
        return launch_options(self.num_warps, self.num_stages)


def launch_options(num_warps: int = 4, num_stages: int = 2, fusion: bool = True) -> dict[str, Any]:
    """Keyword arguments of a launch. FMA contraction is stated because its default differs by version.

    Without `fusion` products and sums round apart, except inside `tl.dot`.
    """
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fusion}


def block_size(size: int, most: int, least: int = 16) -> int:
    """The power of two, within the bounds, that covers `size` if one does."""
    return max(least, min(most, triton.next_power_of_2(max(size, 1))))


def tile_for(rows: int, cols: int, depth: int, dot: tl.dtype, *, accumulators: int = 1) -> Tile:
    """The block for a rows x cols product over `depth`, in a program with that many accumulators.

    Half types fill the tensor cores with 128 x 128 x 64; fp32 ("ieee") and fp64 products run on the FMA
    units, where 64 x 64 keeps two accumulators in registers. Shared memory stays within 100 KB. A tile that was
    measured on the device (`configs`) goes before.
    """
    measured = configs.measured(str(dot), accumulators)
    if measured is not None:
        most = Tile(*measured)
        tall, wide = block_size(rows, most.rows), block_size(cols, most.cols)
        warps = most.num_warps if tall * wide == most.rows * most.cols else min(most.num_warps, 4)
        return Tile(tall, wide, block_size(depth, most.depth), warps, most.num_stages)
    half = dot.primitive_bitwidth == 16
    size = 128 if half else 64
    tall, wide = block_size(rows, size), block_size(cols, size)
    deep = block_size(depth, 64 // accumulators if half else 16)
    crowded = tall * wide == 128 * 128 or (accumulators > 1 and tall * wide == 64 * 64)
    return Tile(tall, wide, deep, 8 if crowded else 4, 3 if half else 2)


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of `x` the current one, as a launch needs; nothing on the CPU (the interpreter)."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


@triton.jit
def program(AXIS: tl.constexpr):
    """The program id as int64."""
    return tl.program_id(AXIS).to(tl.int64)


@triton.jit
def span(start, SIZE: tl.constexpr):
    """`start ... start + SIZE - 1` as int64."""
    return start + tl.arange(0, SIZE).to(tl.int64)


@triton.jit
def load_as(pointers, mask, DTYPE: tl.constexpr):
    """A block, converted at once; 0 outside the mask."""
    return tl.load(pointers, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def load_f32(pointers, mask):
    """A block in fp32; 0 outside the mask."""
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_as(pointers, block, mask):
    """Stores a block in the type of the memory."""
    tl.store(pointers, block.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def add_dot(acc, x, y):
    """`acc + x y` with full-precision products: never TF32."""
    return tl.dot(x, y, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def add_product(
    acc, a, a_outer, a_depth, rows, row_end, b, b_outer, b_depth, cols, col_end, depth,
    DEPTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`acc + A[rows] B[cols]^T`, summed over `depth` in blocks of DEPTH.

    `a` and `b` point to matrices of (outer, depth) strides, so that a transposed operand is a swap of two
    arguments. Rows from `row_end` on and columns from `col_end` on are loaded as zero; zero times infinity is
    NaN, so what leaves the tile must be masked.
    """
    k = tl.arange(0, DEPTH).to(tl.int64)
    x_at = a + rows[:, None] * a_outer + k[None, :] * a_depth
    y_at = b + k[:, None] * b_depth + cols[None, :] * b_outer
    row_inside, col_inside = (rows < row_end)[:, None], (cols < col_end)[None, :]
    for start in range(0, depth, DEPTH):
        inside = k < depth - start
        x = load_as(x_at, row_inside & inside[None, :], DOT)
        y = load_as(y_at, col_inside & inside[:, None], DOT)
        acc = add_dot(acc, x, y)
        x_at += DEPTH * a_depth
        y_at += DEPTH * b_depth
    return acc


@triton.jit
def total(tile):
    """The sum of a 2-D tile at once: Triton 3.6 and 3.7 cannot compile sums of sums for sm_100."""
    return tl.sum(tile)


@triton.jit
def square_sum(tile):
    """The sum of the squares of a 2-D tile."""
    return total(tile * tile)


@triton.jit
def hadamard_sum(x, y):
    """The sum of the element-wise product of two 2-D tiles."""
    return total(x * y)


@triton.jit
def lse_shift(peak):
    """What to subtract from logits whose maximum is `peak`: 0 if that is infinite (inf - inf is NaN)."""
    return tl.where(tl.abs(peak) == float("inf"), 0.0, peak)


@triton.jit
def lse_merge(peak, mass, other_peak, other_mass):
    """The pair (m, s) of log-sum-exp `m + log s` of two parts; starts at (-inf, 0). NaN stays in s."""
    joint = tl.maximum(peak, other_peak)
    shift = lse_shift(joint)
    mass = mass * tl.exp(peak - shift) + other_mass * tl.exp(other_peak - shift)
    return joint, mass


@triton.jit
def lse_update(peak, mass, logits):
    """Takes the columns of a tile into the running (peak, mass) of its rows; masked columns hold -inf."""
    block_peak = tl.max(logits, axis=1)
    block_mass = tl.sum(tl.exp(logits - lse_shift(block_peak)[:, None]), axis=1)
    return lse_merge(peak, mass, block_peak, block_mass)


@triton.jit
def lse_value(peak, mass):
    """The log-sum-exp of a finished pair."""
    return lse_shift(peak) + tl.log(mass)


@triton.jit
def philox_words(seed, rows, block):
    """The 4 x 32 random bits of coordinates 128 block ... 128 block + 127, for each output row.

    Philox4x32-10 with counter (row, block, 0, 0) and the 64-bit seed as key; bit b of word w belongs to
    coordinate 128 block + 32 w + b.
    """
    row = rows.to(tl.uint32)
    zero = row * 0
    return tl.philox(seed, row, zero + block.to(tl.uint32), zero, zero)


@triton.jit
def sign_rows(word, DTYPE: tl.constexpr):
    """The signs of 32 coordinates (rows) for each word (columns): +1 where the bit is set, -1 elsewhere."""
    bits = (word[None, :] >> tl.arange(0, 32).to(tl.uint32)[:, None]) & 1
    return tl.where(bits == 1, 1.0, -1.0).to(DTYPE)


@triton.jit
def row_sum(parts, row, count, BLOCK: tl.constexpr):
    """The sum of one row of contiguous (rows, count) parts, in float64."""
    acc = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, count, BLOCK):
        column = span(start, BLOCK)
        acc += load_as(parts + row * count + column, column < count, tl.float64)
    return tl.sum(acc, axis=0)


@triton.jit
def sum_parts_kernel(parts, out, count, BLOCK: tl.constexpr):
    """out[row] = sum of parts[row, :count]; one program a row."""
    row = program(0)
    store_as(out + row, row_sum(parts, row, count, BLOCK), True)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The row sums of contiguous (rows, count) partial sums, in float64, in an order that the shape fixes."""
    rows, count = parts.shape
    out = torch.empty(rows, dtype=dtype, device=parts.device)
    if rows > 0:
        with on_device(parts):
            sum_parts_kernel[(rows,)](parts, out, count, BLOCK=block_size(count, 1024), **launch_options())
    return out

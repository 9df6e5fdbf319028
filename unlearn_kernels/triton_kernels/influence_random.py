"""Random numbers of the projections in registers: normal entries, signs, and where coordinates are hashed to.

Counters and purposes are those of `unlearn_kernels.reference.sketches`.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.reference.sketches import NORMAL_DIGITS
from unlearn_kernels.triton_kernels.common import philox_words


@functools.cache
def digit_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The entries of `normal_of` on a device, made once: float32 numbers in any type.

    Triton 3.7 cannot make an operand of a float64 product for sm_80 and sm_90 out of what it has loaded as float32.
    """
    return torch.tensor(NORMAL_DIGITS, dtype=torch.float32, device=device).to(dtype)


@triton.jit
def random_words(seed, rows, index, PURPOSE: tl.constexpr):
    """The four words of calls (row, index mod 2^32, index / 2^32, PURPOSE); `rows` and `index` of one shape."""
    row = rows.to(tl.uint32)
    return tl.philox(seed, row, index.to(tl.uint32), (index >> 32).to(tl.uint32), row * 0 + PURPOSE)


@triton.jit
def four_in_order(a, b, c, d):
    """Four blocks as one with a new last dimension of 4."""
    pairs = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(pairs, a.shape + [4])  # noqa: RUF005  a kernel has no starred expressions


@triton.jit
def normal_of(random, table):
    """A standard normal number in fp32 of the low 16 bits: entries for four digits, whose sum never rounds."""
    digits = random.to(tl.int32)
    x = tl.load(table + (digits & 15)).to(tl.float32)
    for i in tl.static_range(1, 4):
        x += tl.load(table + 16 * i + ((digits >> (4 * i)) & 15)).to(tl.float32)
    return x


@triton.jit
def normal_entries(seed, table, rows, first, COORDINATES: tl.constexpr):
    """[rows, COORDINATES] of the normal matrix, from coordinate `first` on, a multiple of 8."""
    index = first // 8 + tl.arange(0, COORDINATES // 8).to(tl.int64)
    at_row, at_index = tl.broadcast(rows[:, None], index[None, :])
    a, b, c, d = random_words(seed, at_row, at_index, 1)
    words = four_in_order(a, b, c, d)
    halves = tl.join(words, words >> 16)
    return normal_of(tl.reshape(halves, [rows.shape[0], COORDINATES]), table)


@triton.jit
def sign_entries(seed, rows, block):
    """[rows, 128] random signs of one block of coordinates, as fp32."""
    a, b, c, d = philox_words(seed, rows, block)
    words = four_in_order(a, b, c, d)
    bits = (words[:, :, None] >> tl.arange(0, 32).to(tl.uint32)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, [rows.shape[0], 128]) == 1, 1.0, -1.0)


@triton.jit
def target(word, first, width):
    """Where the upper 31 bits lead among `width` outputs from `first`, and the lowest bit, set for +1."""
    output = first + (((word >> 1).to(tl.int64) * width) >> 31)
    return output, (word & 1).to(tl.int64)


@triton.jit
def word_of(seed, row, index, PURPOSE: tl.constexpr):
    """Word index % 4 of the call (row, index // 4), each element on its own."""
    a, b, c, d = random_words(seed, index * 0 + row, index // 4, PURPOSE)
    which = index % 4
    return tl.where(which < 2, tl.where(which == 0, a, b), tl.where(which == 2, c, d))


@triton.jit
def side_target(seed, outer, index, outputs):
    """Where rows (`outer` 1) or columns (0) of a matrix gradient go, and their bit."""
    return target(word_of(seed, outer, index, 4), 0, outputs)


@triton.jit
def pair_target(seed, coordinate, inner, outputs):
    """Where coordinates of a matrix with `inner` columns go: the xor of its sides' outputs; equal bits are +1."""
    row, row_bit = side_target(seed, 1, coordinate // inner, outputs)
    col, col_bit = side_target(seed, 0, coordinate % inner, outputs)
    return row ^ col, 1 - (row_bit ^ col_bit)


@triton.jit
def parity_sign(x, DTYPE: tl.constexpr):
    """-1 where the number of set bits among the lower 32 is odd, else 1."""
    bits = x.to(tl.uint32)
    for step in tl.static_range(5):
        bits = bits ^ (bits >> (16 >> step))
    return tl.where((bits & 1) == 1, -1.0, 1.0).to(DTYPE)

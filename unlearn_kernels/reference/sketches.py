"""Random projections other than signs in plain formulas."""

from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.influence import Words, philox4x32, rademacher_signs

NORMALS_A_CALL: Final = 8
TERMS_A_CALL: Final = 4
HADAMARD_BLOCK: Final = 4096
_NORMALS, _TERMS, _DIAGONAL, _SIDES, _ROWS = 1, 2, 3, 4, 5  # the last word of the counter
_LOW: Final = 0xFFFFFFFF
_AT_ONCE: Final = 1 << 22

# Of the four digits of a normal number, lowest first: entries without sign, times weights, searched for such as bring
# all 65536 sums closest to the normal distribution.
_FIRST, _SECOND = (6, 22, 34, 40, 53, 56, 65, 111), (4, 5, 16, 25, 32, 40, 60, 125)
NORMAL_DIGITS: Final = tuple(
    tuple(sign * weight * x / 4096 for sign in (1, -1) for x in entries)
    for weight, entries in ((37, _FIRST), (32, _SECOND), (39, _FIRST), (40, _SECOND))
)


def _words(row: Tensor, index: Tensor, purpose: int, seed: int) -> Words:
    row, index = torch.broadcast_tensors(row, index)
    return philox4x32((row, index & _LOW, index >> 32, torch.full_like(row, purpose)), seed)


def normal_of(random: Tensor) -> Tensor:
    """Return a standard normal float32 for each integer of 16 bits: the sum of an entry for each of its 4-bit digits.

    Entries are multiples of 1 / 4096 and sums less than 5, so that no addition rounds.
    """
    table = torch.tensor(NORMAL_DIGITS, dtype=torch.float32, device=random.device)
    digits = [entries[(random >> 4 * i & 15).long()] for i, entries in enumerate(table)]
    return digits[0] + digits[1] + digits[2] + digits[3]


def normal_entries(rows: Tensor, cols: Tensor, seed: int) -> Tensor:
    """Return the normal matrix at `rows` x `cols` (two vectors of indices), float32.

    Philox counter (row, col // 8 mod 2^32, col // 8 / 2^32, 1); word col % 8 // 2, its low half for even columns.
    """
    blocks, where = torch.unique(cols // NORMALS_A_CALL, return_inverse=True)
    words = torch.stack(_words(rows[:, None], blocks, _NORMALS, seed), dim=-1)
    inside = cols % NORMALS_A_CALL
    return normal_of(words[:, where, inside // 2] >> 16 * (inside % 2) & 0xFFFF)


def normal_project(g: Tensor, k: int, seed: int, offset: int) -> Tensor:
    """Return `g P^T / sqrt(k)`, P standard normal, columns of `g` the coordinates from `offset` on."""
    out = g.new_zeros(g.shape[0], k, dtype=accumulation_dtype(g))
    rows, step = torch.arange(k, device=g.device), max(1024, _AT_ONCE // max(k, 1))
    for begin in range(0, g.shape[1], step):
        cols = torch.arange(begin, min(begin + step, g.shape[1]), device=g.device)
        out += g[:, cols].to(out.dtype) @ normal_entries(rows, cols + offset, seed).to(out.dtype).T
    return out / max(k, 1) ** 0.5


def dense_adjoint(y: Tensor, dim: int, seed: int, offset: int, normal: bool) -> Tensor:
    """Return `y P / sqrt(k)` for coordinates offset ... offset + dim - 1."""
    entries = normal_entries if normal else rademacher_signs
    out = y.new_empty(y.shape[0], dim, dtype=accumulation_dtype(y))
    rows, step = torch.arange(y.shape[1], device=y.device), max(1024, _AT_ONCE // max(y.shape[1], 1))
    for begin in range(0, dim, step):
        cols = torch.arange(begin, min(begin + step, dim), device=y.device)
        out[:, cols] = y.to(out.dtype) @ entries(rows, cols + offset, seed).to(out.dtype)
    return out / max(y.shape[1], 1) ** 0.5


def _targets(
    row: int, cols: Tensor, purpose: int, first: int, width: int, seed: int
) -> tuple[Tensor, Tensor]:
    blocks, where = torch.unique(cols // TERMS_A_CALL, return_inverse=True)
    words = torch.stack(_words(torch.full_like(blocks, row), blocks, purpose, seed), dim=-1)
    word = words[where, cols % TERMS_A_CALL]
    return first + ((word >> 1) * width >> 31), 2 * (word & 1) - 1


def sparse_targets(cols: Tensor, term: int, k: int, terms: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the output of each coordinate in share `term` of `terms`, and its sign, int64.

    Outputs term k // terms ... of k. Word col % 4 of the Philox call (term, col // 4 mod 2^32, col // 4 / 2^32, 2):
    the upper 31 bits scaled to the share's width, the lowest one for +1.
    """
    first = term * k // terms
    return _targets(term, cols, _TERMS, first, (term + 1) * k // terms - first, seed)


def side_targets(cols: Tensor, outer: bool, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return where the rows (`outer`) or the columns of a matrix gradient go, and their signs.

    As `sparse_targets`, with the call (outer, col // 4 mod 2^32, col // 4 / 2^32, 4).
    """
    return _targets(int(outer), cols, _SIDES, 0, k, seed)


def pair_targets(cols: Tensor, inner: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the output and sign of the coordinates of a matrix with `inner` columns: xor and product of its sides'."""
    (row, row_sign), (col, col_sign) = (
        side_targets(at, outer, k, seed) for at, outer in ((cols // inner, True), (cols % inner, False))
    )
    return row ^ col, row_sign * col_sign


def sparse_project(g: Tensor, k: int, terms: int, seed: int, offset: int, inner: int) -> Tensor:
    """Return the sums of the coordinates of `g` that go to each of `k` outputs, over sqrt(terms)."""
    out = g.new_zeros(g.shape[0], k, dtype=accumulation_dtype(g))
    for begin in range(0, g.shape[1], _AT_ONCE):
        x = g[:, begin : begin + _AT_ONCE].to(out.dtype)
        cols = torch.arange(begin, begin + x.shape[1], device=g.device) + offset
        for term in range(terms):
            place, sign = (
                pair_targets(cols, inner, k, seed) if inner else sparse_targets(cols, term, k, terms, seed)
            )
            out.index_add_(1, place, x * sign)
    return out / terms**0.5


def walsh(x: Tensor) -> Tensor:
    """Return `sum_j (-1)^popcount(i & j) x_j` along the last dimension, a power of two."""
    shape, h = x.shape, 1
    while h < shape[-1]:
        a, b = x.reshape(*shape[:-1], shape[-1] // (2 * h), 2, h).unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).reshape(shape)
        h *= 2
    return x


def diagonal_signs(cols: Tensor, seed: int) -> Tensor:
    """Return the sign of each coordinate: the layout of `rademacher_signs`, counter (0, ..., 3)."""
    blocks, where = torch.unique(cols // 128, return_inverse=True)
    words = torch.stack(_words(torch.zeros_like(blocks), blocks, _DIAGONAL, seed), dim=-1)
    return 2 * (words[where, cols % 128 // 32] >> cols % 32 & 1) - 1


def hadamard_rows(k: int, bits: int, seed: int, device: torch.device | None = None) -> Tensor:
    """Return k different numbers of `bits` bits: 0, 1, ... through random bijections, (k,) int64."""
    mask, x = (1 << bits) - 1, torch.arange(k, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    for step in range(4):
        a, b, c, d = (int(w) for w in _words(zero, zero + step, _ROWS, seed))
        x = x * (2 * (a << 8 ^ b) + 1) + (c << 8 ^ d) & mask
        x = x ^ x >> (bits + 1) // 2
    return x


def _parity(x: Tensor) -> Tensor:
    for shift in (32, 16, 8, 4, 2, 1):
        x = x ^ x >> shift
    return x & 1


def _block_signs(rows: Tensor, begin: int) -> Tensor:
    return 1 - 2 * _parity(rows // HADAMARD_BLOCK & begin // HADAMARD_BLOCK)


def hadamard_project(g: Tensor, rows: Tensor, seed: int, offset: int) -> Tensor:
    """Return `sum_c (-1)^popcount(c & rows_j) s_c g_c / sqrt(k)` by transforms of 4096 coordinates."""
    out = g.new_zeros(g.shape[0], len(rows), dtype=accumulation_dtype(g))
    for begin in range(0, g.shape[1], HADAMARD_BLOCK):
        x = g[:, begin : begin + HADAMARD_BLOCK].to(out.dtype)
        cols = torch.arange(begin, begin + x.shape[1], device=g.device) + offset
        padded = torch.nn.functional.pad(x * diagonal_signs(cols, seed), (0, HADAMARD_BLOCK - x.shape[1]))
        out += walsh(padded)[:, rows % HADAMARD_BLOCK] * _block_signs(rows, begin + offset)
    return out / max(len(rows), 1) ** 0.5


def hadamard_adjoint(y: Tensor, rows: Tensor, dim: int, seed: int, offset: int) -> Tensor:
    """Return the transpose of `hadamard_project` for coordinates offset ... offset + dim - 1."""
    out = y.new_empty(y.shape[0], dim, dtype=accumulation_dtype(y))
    for begin in range(0, dim, HADAMARD_BLOCK):
        z = torch.zeros(y.shape[0], HADAMARD_BLOCK, dtype=out.dtype, device=y.device)
        z.index_add_(1, rows % HADAMARD_BLOCK, y.to(out.dtype) * _block_signs(rows, begin + offset))
        size = min(HADAMARD_BLOCK, dim - begin)
        cols = torch.arange(begin, begin + size, device=y.device)
        out[:, cols] = walsh(z)[:, :size] * diagonal_signs(cols + offset, seed)
    return out / max(len(rows), 1) ** 0.5


def sparse_adjoint(y: Tensor, dim: int, terms: int, seed: int, offset: int, inner: int) -> Tensor:
    """Return the transpose of `sparse_project` for coordinates offset ... offset + dim - 1."""
    out = y.new_zeros(y.shape[0], dim, dtype=accumulation_dtype(y))
    for begin in range(0, dim, _AT_ONCE):
        cols = torch.arange(begin, min(begin + _AT_ONCE, dim), device=y.device)
        for term in range(terms):
            place, sign = (
                pair_targets(cols + offset, inner, y.shape[1], seed)
                if inner
                else sparse_targets(cols + offset, term, y.shape[1], terms, seed)
            )
            out[:, cols] += y[:, place].to(out.dtype) * sign
    return out / terms**0.5


def tensor_sketch(a: Tensor, g: Tensor, bias: bool, k: int, seed: int) -> Tensor:
    """Return `H (sum_t H a'_t * H g'_t) / k`, a'_t and g'_t the sums of what goes to each output on either side."""
    dtype = accumulation_dtype(a, g)
    a, g = a.to(dtype), g.to(dtype)
    if bias:
        a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], dim=2)
    sides = []
    for x, outer in ((a, False), (g, True)):
        place, sign = side_targets(torch.arange(x.shape[2], device=x.device), outer, k, seed)
        sides.append(walsh(x.new_zeros(*x.shape[:2], k).index_add_(2, place, x * sign)))
    return walsh((sides[0] * sides[1]).sum(1)) / k

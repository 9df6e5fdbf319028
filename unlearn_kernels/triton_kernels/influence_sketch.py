"""Sketches: sums of signed coordinates by hashed output, rows of a Hadamard matrix, tensor sketches."""

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_dot,
    block_size,
    dot_dtype,
    launch_options,
    load_as,
    on_device,
    program,
    span,
)
from unlearn_kernels.triton_kernels.influence_random import (
    four_in_order,
    pair_target,
    parity_sign,
    random_words,
    side_target,
    target,
)

_MOST_PARTS: Final = 256
_CHUNK: Final = 1024  # coordinates that are sorted by output
_SAMPLES: Final = 8  # that share the sorted coordinates
_SCRATCH: Final = 1 << 24  # elements
_BLOCK: Final = 4096  # coordinates that a transform takes
_FACTOR: Final = 16  # of a transform in one pass; short sums keep their digits


@triton.jit
def _joined(left_place, left_sum, place, value):
    """Sums of runs of equal places, which stand side by side."""
    return place, value + tl.where(left_place == place, left_sum, 0.0)


@triton.jit(do_not_specialize=["seed"])
def sparse_kernel(
    g, parts, batch, dim, outputs, terms, inner, seed, offset, length, g_b, g_d, row_tiles,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """parts[part, b] += the signed coordinates part * length ... of g[b], each where share `term` of the hash leads.

    The coordinates of a chunk are sorted by output; then a scan adds up the runs, and the last of a run has its sum.
    """
    task = program(0)
    part, rest = task // (terms * row_tiles), task % (terms * row_tiles)
    term, first_row = rest // row_tiles, rest % row_tiles * ROWS
    begin = term * outputs // terms
    width = (term + 1) * outputs // terms - begin
    parts += part * batch * outputs
    end = tl.minimum(dim, (part + 1) * length)
    local = tl.arange(0, CHUNK).to(tl.int64)
    for start in range(part * length, end, CHUNK):
        if PAIRS:
            place, bit = pair_target(seed, offset + start + local, inner, outputs)
        else:
            index = (offset + start) // 4 + tl.arange(0, CHUNK // 4).to(tl.int64)
            a, b, c, d = random_words(seed, index * 0 + term, index, 2)
            place, bit = target(tl.reshape(four_in_order(a, b, c, d), [CHUNK]), begin, width)
        place = tl.where(start + local < end, place, outputs)
        order = tl.sort((place << 32) | (local << 1) | bit)
        place = order >> 32
        from_start = (order >> 1) & 0x7FFFFFFF
        after = tl.gather(place, tl.minimum(tl.arange(0, CHUNK) + 1, CHUNK - 1), 0)
        last = ((place != after) | (local == CHUNK - 1)) & (place < outputs)
        for b in range(first_row, tl.minimum(batch, first_row + ROWS)):
            x = load_as(g + b * g_b + (start + from_start) * g_d, place < outputs, ACC)
            x = tl.where((order & 1) == 1, x, -x)
            _, sums = tl.associative_scan((place, x), 0, _joined)
            at = parts + b * outputs + place
            tl.store(at, tl.load(at, mask=last, other=0.0).to(ACC) + sums, mask=last)
        tl.debug_barrier()  # another thread may add to these outputs next


def sparse_project(g: Tensor, k: int, terms: int, seed: int, offset: int, inner: int) -> Tensor:
    """The raw operator: g (B, dim) -> (B, k).

    Scratch: `parts * B * k` sums, at most 256 parts and 64 MB (twice for float64), at least one part.
    """
    batch, dim = g.shape
    acc = acc_dtype(dot_dtype(g))
    dtype = torch.float64 if acc == tl.float64 else torch.float32
    if g.numel() == 0 or k == 0:
        return g.new_zeros(batch, k, dtype=dtype)
    most = max(1, min(_MOST_PARTS, _SCRATCH // (batch * k)))
    chunk = block_size(dim, _CHUNK)
    length = triton.cdiv(triton.cdiv(dim, most), chunk) * chunk
    count, row_tiles = triton.cdiv(dim, length), triton.cdiv(batch, _SAMPLES)
    parts = torch.zeros(count, batch, k, dtype=dtype, device=g.device)
    with on_device(g):
        sparse_kernel[(count * terms * row_tiles,)](
            g, parts, batch, dim, k, terms, inner, seed, offset, length, *g.stride(), row_tiles,
            CHUNK=chunk, ROWS=_SAMPLES, ACC=acc, PAIRS=inner > 0, **launch_options(),
        )  # fmt: skip
    return (parts.sum(0, dtype=torch.float64) / terms**0.5).to(dtype)


@triton.jit(do_not_specialize=["seed"])
def diagonal_kernel(words, seed, first, count, BLOCK: tl.constexpr):
    """words[4 i ...] = the 128 signs of block first + i of the diagonal."""
    i = span(program(0) * BLOCK, BLOCK)
    a, b, c, d = random_words(seed, i * 0, first + i, 3)
    at = words + 4 * i
    tl.store(at, a.to(tl.int32, bitcast=True), mask=i < count)
    tl.store(at + 1, b.to(tl.int32, bitcast=True), mask=i < count)
    tl.store(at + 2, c.to(tl.int32, bitcast=True), mask=i < count)
    tl.store(at + 3, d.to(tl.int32, bitcast=True), mask=i < count)


@triton.jit
def walsh_kernel(
    x, words, out, dim, x_b, x_c, lines, inner, tiles, FACTOR: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """One factor of a transform: out[b, q, o, i] = sum_m (-1)^popcount(o & m) x[b, q, m, i], i < inner.

    Coordinates from `dim` on are zero. SIGNED: coordinates are multiplied by the diagonal, whose bits are `words`.
    """
    task = program(0)
    b = task // tiles
    line = span(task % tiles * COLS, COLS)
    base = line // inner * (FACTOR * inner) + line % inner
    o = tl.arange(0, FACTOR)
    acc = tl.zeros((FACTOR, COLS), dtype=ACC)
    for m in range(FACTOR):
        at = base + m * inner
        inside = (line < lines) & (at < dim)
        value = load_as(x + b * x_b + at * x_c, inside, ACC)
        if SIGNED:
            word = tl.load(words + at // 32, mask=inside, other=0).to(tl.int32)
            value = tl.where(((word >> (at % 32).to(tl.int32)) & 1) == 1, value, -value)
        acc += parity_sign(o & m, ACC)[:, None] * value[None, :]
    out += b * lines * FACTOR
    tl.store(out + base[None, :] + o[:, None] * inner, acc, mask=(line < lines)[None, :])


@triton.jit
def select_kernel(
    z, rows, parts, outputs, blocks, first, length, count, tiles, FIRST: tl.constexpr, COLS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, j, part] (+)= row rows[j] of the transform, over `length` blocks of 4096, each transformed in z."""
    task = program(0)
    b, rest = task // (count * tiles), task % (count * tiles)
    part, j = rest // tiles, span(rest % tiles * COLS, COLS)
    row = tl.load(rows + j, mask=j < outputs, other=0).to(tl.int64)
    acc = tl.zeros((COLS,), dtype=ACC)
    for block in range(part * length, tl.minimum(blocks, (part + 1) * length)):
        value = load_as(z + (b * blocks + block) * 4096 + row % 4096, j < outputs, ACC)
        acc += parity_sign((row // 4096) & (first + block), ACC) * value
    at = parts + (b * outputs + j) * count + part
    if not FIRST:
        acc += load_as(at, j < outputs, ACC)
    tl.store(at, acc, mask=j < outputs)


def _launch_walsh(x: Tensor, words: Tensor | None, out: Tensor, lines: int, inner: int, factor: int) -> None:
    """x (B, n) -> out (B, lines * factor)."""
    cols = block_size(lines, 128)
    tiles = triton.cdiv(lines, cols)
    with on_device(x):
        walsh_kernel[(x.shape[0] * tiles,)](
            x, words, out, x.shape[1], *x.stride(), lines, inner, tiles, FACTOR=factor, COLS=cols,
            ACC=acc_dtype(dot_dtype(out)), SIGNED=words is not None, **launch_options(),
        )  # fmt: skip


def hadamard_project(g: Tensor, rows: Tensor, seed: int, offset: int) -> Tensor:
    """The raw operator: g (B, dim), rows (k,) int64 -> (B, k).

    Some blocks of 4096 coordinates at a time are transformed to scratch. Scratch: at most 128 MB of them (twice for
    float64), at least a block of each sample, and `32 B k` sums.
    """
    (batch, dim), k = g.shape, rows.shape[0]
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    if g.numel() == 0 or k == 0:
        return g.new_zeros(batch, k, dtype=dtype)
    slab = max(1, min(triton.cdiv(dim, _BLOCK), _SCRATCH // (batch * _BLOCK)))
    length = triton.cdiv(slab, 32)
    parts = g.new_empty(batch * k, triton.cdiv(slab, length), dtype=dtype)
    for first in range(0, triton.cdiv(dim, _BLOCK), slab):
        x = g[:, first * _BLOCK : (first + slab) * _BLOCK]
        begin = offset // _BLOCK + first
        _add_selected(_transformed(x, seed, begin, dtype), rows, parts, begin, length, first == 0)
    return (parts.sum(1, dtype=torch.float64) / k**0.5).to(dtype).view(batch, k)


def _transformed(g: Tensor, seed: int, first: int, dtype: torch.dtype) -> Tensor:
    """(B, n) -> (B, blocks, 4096): signs, then the factors of the transform between two buffers."""
    blocks = triton.cdiv(g.shape[1], _BLOCK)
    size, calls = blocks * _BLOCK, blocks * _BLOCK // 128
    words = torch.empty(size // 32, dtype=torch.int32, device=g.device)
    with on_device(g):
        diagonal_kernel[(triton.cdiv(calls, 128),)](
            words, seed, first * _BLOCK // 128, calls, BLOCK=128, **launch_options()
        )
    out, spare = (g.new_empty(g.shape[0], size, dtype=dtype) for _ in range(2))
    x = g
    for inner, factor in _factors(_BLOCK):
        _launch_walsh(x, words if inner == 1 else None, out, size // factor, inner, factor)
        x, out, spare = out, spare, out
    return x.view(g.shape[0], blocks, _BLOCK)


def _add_selected(z: Tensor, rows: Tensor, parts: Tensor, begin: int, length: int, first: bool) -> None:
    (batch, blocks, _), k, count = z.shape, rows.shape[0], parts.shape[1]
    cols = block_size(k, 256)
    tiles = triton.cdiv(k, cols)
    with on_device(z):
        select_kernel[(batch * count * tiles,)](
            z, rows, parts, k, blocks, begin, length, count, tiles, FIRST=first, COLS=cols,
            ACC=acc_dtype(dot_dtype(z)), **launch_options(),
        )  # fmt: skip


@triton.jit
def _side(
    x, t_stride, x_stride, t, tokens, features, seed, outer, cols, outputs, BIAS: tl.constexpr, DEPTH: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """[t, cols] of the transform of the sums of what goes to each output: a product with signs by parity."""
    acc = tl.zeros((t.shape[0], cols.shape[0]), dtype=ACC)
    for start in range(0, features, DEPTH):
        i = span(tl.to_tensor(start), DEPTH)
        place, bit = side_target(seed, outer, i, outputs)
        signs = parity_sign(place[:, None] & cols[None, :], ACC) * (2 * bit - 1).to(ACC)[:, None]
        inside = (t < tokens)[:, None] & (i < features)[None, :]
        acc = add_dot(
            acc, load_as(x + t[:, None] * t_stride + i[None, :] * x_stride, inside, DOT), signs.to(DOT)
        )
    if BIAS:
        place, bit = side_target(seed, outer, cols * 0 + features, outputs)
        acc += (parity_sign(place & cols, ACC) * (2 * bit - 1).to(ACC))[None, :]
    return acc


@triton.jit(do_not_specialize=["seed"])
def sides_kernel(
    a, g, out, tokens, inputs, features, outputs, seed, a_b, a_t, a_d, g_b, g_t, g_p, tiles, BIAS: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT_A: tl.constexpr, DOT_G: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """out[b, m] = sum_t of the products of both sides' transforms."""
    task = program(0)
    b, cols = task // tiles, span(task % tiles * COLS, COLS)
    acc = tl.zeros((COLS,), dtype=ACC)
    for start in range(0, tokens, TOKENS):
        t = span(tl.to_tensor(start), TOKENS)
        y = _side(
            g + b * g_b, g_t, g_p, t, tokens, features, seed, 1, cols, outputs, False, DEPTH, DOT_G, ACC
        )
        x = _side(a + b * a_b, a_t, a_d, t, tokens, inputs, seed, 0, cols, outputs, BIAS, DEPTH, DOT_A, ACC)
        acc += tl.sum(tl.where((t < tokens)[:, None], x * y, 0.0), axis=0)
    tl.store(out + b * outputs + cols, acc, mask=cols < outputs)


def tensor_sketch(a: Tensor, g: Tensor, bias: bool, k: int, seed: int) -> Tensor:
    """The raw operator: a (B, T, d), g (B, T, p) -> (B, k).

    The transforms of both sides are products with matrices of signs, made where they are multiplied; the last one is
    done in passes. Scratch: twice the result.
    """
    (batch, tokens, inputs), features = a.shape, g.shape[2]
    of_a, of_g = dot_dtype(a), dot_dtype(g)
    double = tl.float64 in (of_a, of_g)
    acc = tl.float64 if double else tl.float32
    out = a.new_empty(batch, k, dtype=torch.float64 if double else torch.float32)
    if batch == 0:
        return out
    cols = block_size(k, 64)
    with on_device(a):
        sides_kernel[(batch * triton.cdiv(k, cols),)](
            a, g, out, tokens, inputs, features, k, seed, *a.stride(), *g.stride(), triton.cdiv(k, cols), BIAS=bias,
            TOKENS=block_size(tokens, _tokens(acc)), COLS=cols, DEPTH=_depth(of_a, of_g), DOT_A=of_a, DOT_G=of_g,
            ACC=acc, **launch_options(),
        )  # fmt: skip
    spare = torch.empty_like(out)
    for inner, factor in _factors(k):
        _launch_walsh(out, None, spare, k // factor, inner, factor)
        out, spare = spare, out
    return out.div_(k)


def _tokens(acc: tl.dtype) -> int:
    return 16 if acc == tl.float64 else 64


def _depth(*dots: tl.dtype) -> int:
    return 32 if all(dot.primitive_bitwidth == 16 for dot in dots) else 16


def _factors(k: int) -> Iterator[tuple[int, int]]:
    """(inner, factor) of the passes of a transform of k, a power of two."""
    inner = 1
    while inner < k:
        factor = min(_FACTOR, k // inner)
        yield inner, factor
        inner *= factor


def _sparse_case(dtype: str, pairs: bool = False) -> AotCase:
    acc = acc_dtype(DTYPES[dtype])
    return AotCase(
        sparse_kernel,
        {"g": dtype, "parts": str(acc)},
        {"g_d": 1, "CHUNK": _CHUNK, "ROWS": _SAMPLES, "ACC": acc, "PAIRS": pairs},
        multiples_of_16=("g_b", "outputs", "length"),
    )


def _walsh_case(dtype: str, signed: bool) -> AotCase:
    acc = acc_dtype(DTYPES[dtype])
    return AotCase(
        walsh_kernel,
        {"x": dtype, "out": str(acc)} | ({"words": "i32"} if signed else {}),
        {"x_c": 1, "FACTOR": _FACTOR, "COLS": 128, "ACC": acc, "SIGNED": signed}
        | ({} if signed else {"words": None}),
        multiples_of_16=("dim", "x_b", "lines"),
    )


def _sides_case(dtype: str, **more: Any) -> AotCase:
    dot, acc = DTYPES[dtype], acc_dtype(DTYPES[dtype])
    constants = {
        "TOKENS": _tokens(acc),
        "COLS": 64,
        "DEPTH": _depth(dot),
        "DOT_A": dot,
        "DOT_G": dot,
        "ACC": acc,
    }
    return AotCase(
        sides_kernel,
        {"a": dtype, "g": dtype, "out": str(acc)},
        constants | {"a_d": 1, "g_p": 1, "BIAS": True},
        multiples_of_16=("tokens", "inputs", "features", "outputs", "a_b", "a_t", "g_b", "g_t"),
        **more,
    )


AOT: Final = (
    _sparse_case("fp32"),
    _sparse_case("bf16"),
    _sparse_case("fp64"),
    _sparse_case("fp32", pairs=True),
    AotCase(diagonal_kernel, {"words": "i32"}, {"BLOCK": 128}),
    _walsh_case("fp32", True),
    _walsh_case("bf16", True),
    _walsh_case("fp32", False),
    _walsh_case("fp64", False),
    *(
        AotCase(
            select_kernel,
            {"z": dtype, "rows": "i64", "parts": dtype},
            {"FIRST": False, "COLS": 256, "ACC": DTYPES[dtype]},
        )
        for dtype in ("fp32", "fp64")
    ),
    _sides_case("fp32"),
    _sides_case("fp64", spills=True),
    _sides_case("bf16", tensor_cores=True),
    _sides_case("fp16", tensor_cores=True),
)

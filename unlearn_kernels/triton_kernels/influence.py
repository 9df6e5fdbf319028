"""Random projections with signs made in registers, and the best rows of a store for each query."""

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_dot,
    add_product,
    block_size,
    dot_dtype,
    launch_options,
    load_as,
    on_device,
    philox_words,
    program,
    sign_rows,
    span,
    tile_for,
)

_SIGN_BLOCK: Final = 128  # signs of one Philox call
RUN: Final = 2048  # coordinates whose sum is a chain; above that, sums of sums
_MOST_PARTS: Final = 256
_QUERIES: Final = 1024  # that are searched for at once
_SCORES: Final = 1 << 22  # in memory at once
_LOW: Final = 0xFFFFFFFF
_OTHER_END: Final = -1 << 32  # turns a key for the largest into one for the smallest


@triton.jit(do_not_specialize=["seed"])
def project_kernel(
    g, blocks, parts, batch, dim, outputs, seed, length, g_b, g_d, row_tiles, col_tiles, count,
    ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    SCATTERED: tl.constexpr,
):  # fmt: skip
    """parts[b, j, part] = g[b] times the signs of row j, over `length` coordinates from part * length on.

    SCATTERED: columns 128 n ... 128 n + 127 are the coordinates of block blocks[n] instead of n.
    """
    task = program(0)
    part, tile = task // (row_tiles * col_tiles), task % (row_tiles * col_tiles)
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    end = tl.minimum(dim, (part + 1) * length)
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    for start in range(part * length, end, RUN):
        stop = tl.minimum(end, start + RUN)
        acc += signed_sum(g, blocks, seed, start, stop, g_b, g_d, rows, batch, cols, DOT, ACC, SCATTERED)
    inside = (rows < batch)[:, None] & (cols < outputs)[None, :]
    tl.store(parts + (rows[:, None] * outputs + cols[None, :]) * count + part, acc, mask=inside)


@triton.jit
def signed_sum(
    g, blocks, seed, start, end, g_b, g_d, rows, batch, cols, DOT: tl.constexpr, ACC: tl.constexpr,
    SCATTERED: tl.constexpr,
):  # fmt: skip
    """Multiplies g[rows, start:end] and the signs; `start` is a multiple of 128."""
    acc = tl.zeros((rows.shape[0], cols.shape[0]), dtype=ACC)
    for at in range(start, end, 128):
        block = tl.to_tensor(at // 128)
        if SCATTERED:
            block = tl.load(blocks + block).to(tl.int64)
        words = philox_words(seed, cols, block)
        for w in tl.static_range(4):
            k = span(at + 32 * w, 32)
            inside = (rows < batch)[:, None] & (k < end)[None, :]
            x = load_as(g + rows[:, None] * g_b + k[None, :] * g_d, inside, DOT)
            acc = add_dot(acc, x, sign_rows(words[w], DOT))
    return acc


def _sign_warps(dot: tl.dtype) -> int:
    """fp32 and fp64 products run on FMA units with operands in registers: they need more threads."""
    return 4 if dot.primitive_bitwidth == 16 else 8


class Parts(NamedTuple):
    """How a projection of (batch, dim) to k outputs is split: tiles of (rows, cols), sums of `length` coordinates."""

    rows: int
    cols: int
    length: int
    shares: int
    row_tiles: int
    col_tiles: int

    @staticmethod
    def of(batch: int, dim: int, k: int) -> "Parts":
        """At most 256 parts of at least 8192 coordinates each."""
        rows, cols = block_size(batch, 64), block_size(k, 64)
        length = triton.cdiv(max(8192, triton.cdiv(dim, _MOST_PARTS)), RUN) * RUN
        shares, row_tiles, col_tiles = (
            triton.cdiv(dim, length),
            triton.cdiv(batch, rows),
            triton.cdiv(k, cols),
        )
        return Parts(rows, cols, length, shares, row_tiles, col_tiles)

    @property
    def programs(self) -> int:
        """The number of programs."""
        return self.shares * self.row_tiles * self.col_tiles


def rademacher_project(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    """(B, k) projections of g (B, dim).

    Scratch: `parts * B * k` sums, at most 256 parts of at least 8192 coordinates each.
    """
    batch, dim = g.shape
    dot = dot_dtype(g)
    dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    if g.numel() == 0 or k == 0:
        return g.new_zeros(batch, k, dtype=dtype)
    split = Parts.of(batch, dim, k)
    parts = torch.empty(batch * k, split.shares, dtype=dtype, device=g.device)
    with on_device(g):
        project_kernel[(split.programs,)](
            g, blocks, parts, batch, dim, k, seed, split.length, *g.stride(), split.row_tiles, split.col_tiles,
            split.shares, ROWS=split.rows, COLS=split.cols, RUN=RUN, DOT=dot, ACC=acc_dtype(dot),
            SCATTERED=blocks is not None, **launch_options(_sign_warps(dot)),
        )  # fmt: skip
    return (parts.sum(1, dtype=torch.float64) / k**0.5).to(dtype).view(batch, k)


@triton.jit
def score_kernel(
    queries, rows, out, count, size, depth, first, q_q, q_d, r_r, r_d, ld, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, RUN: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, KEYS: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """out[q, n] = the score of row first + n, or the key that orders it."""
    tile = program(0)
    query, row = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    acc = tl.zeros((ROWS, COLS), dtype=ACC)
    rows += first * r_r
    for start in range(0, depth, RUN):
        acc += add_product(
            tl.zeros((ROWS, COLS), dtype=ACC), queries + start * q_d, q_q, q_d, query, count,
            rows + start * r_d, r_r, r_d, row, size, tl.minimum(RUN, depth - start), DEPTH, DOT,
        )  # fmt: skip
    at = out + query[:, None] * ld + row[None, :]
    inside = (query < count)[:, None] & (row < size)[None, :]
    if KEYS:
        tl.store(at, keys(acc, first + row[None, :], LARGEST), mask=inside)
    else:
        tl.store(at, acc, mask=inside)


@triton.jit
def keys(scores, index, LARGEST: tl.constexpr):
    """int64 keys, the best score first in descending order, equal ones by index: (ordered bits, ~index)."""
    # Adding 0 makes -0 equal to 0; NaN becomes the largest pattern.
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(scores != scores, 0x7FFFFFFF, bits)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if not LARGEST:
        ordered = ~ordered
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index)


# The best rows of at most _QUERIES queries.
Search = Callable[[Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]


def topk(
    queries: Tensor, rows: Tensor, k: int, largest: bool, search: Search | None = None
) -> tuple[Tensor, Tensor]:
    """Values and indices (Q, k) of the best rows, some queries at a time and a range of rows after the other.

    Scratch: 32 MB of scores, and twice the result of those queries.
    """
    if rows.shape[0] > _LOW:
        raise ValueError(f"rows must be at most 2^32 - 1 on a GPU, got {rows.shape[0]}")
    wide = torch.float64 if queries.dtype == torch.float64 else torch.float32
    values = torch.empty(queries.shape[0], k, dtype=wide, device=queries.device)
    indices = torch.empty(queries.shape[0], k, dtype=torch.int64, device=queries.device)
    if k > 0:
        search = search or (_search_doubles if wide == torch.float64 else _search_floats)
        for part in (slice(q, q + _QUERIES) for q in range(0, queries.shape[0], _QUERIES)):
            values[part], indices[part] = search(queries[part], rows, k, largest)
    return values, indices


def _scores(queries: Tensor, rows: Tensor, first: int, size: int, largest: bool) -> Tensor:
    """Scores (float64) or keys (int64) of `size` rows from `first`."""
    dot = dot_dtype(queries, rows)
    as_keys = dot != tl.float64
    tile = tile_for(queries.shape[0], size, queries.shape[1], dot, accumulators=2)
    dtype = torch.int64 if as_keys else torch.float64
    out = torch.empty(queries.shape[0], size, dtype=dtype, device=rows.device)
    col_tiles = triton.cdiv(size, tile.cols)
    with on_device(queries):
        score_kernel[(triton.cdiv(queries.shape[0], tile.rows) * col_tiles,)](
            queries, rows, out, queries.shape[0], size, queries.shape[1], first,
            *queries.stride(), *rows.stride(), out.stride(0), col_tiles,
            ROWS=tile.rows, COLS=tile.cols, DEPTH=tile.depth, RUN=RUN, DOT=dot, ACC=acc_dtype(dot),
            KEYS=as_keys, LARGEST=largest, **tile.launch(),
        )  # fmt: skip
    return out


def _ranges(queries: int, rows: int) -> list[tuple[int, int]]:
    """(first, size) of the rows that are scored at once."""
    step = max(4096, _SCORES // max(queries, 1))
    return [(first, min(step, rows - first)) for first in range(0, rows, step)]


def best_keys(
    count: int, size: int, k: int, ends: int, keys_of: Callable[[int, int], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Values (count, k) and rows for each end (1 the largest, 2 the smallest, 3 both) of `size` rows.

    `keys_of(first, n)` gives the keys (count, n) of n rows, for the smallest if only those are wanted. They are all
    different: the selection has one answer.
    """
    best: list[Tensor] = []
    for first, n in _ranges(count, size):
        found = keys_of(first, n)
        sides = [found, found ^ _OTHER_END] if ends == 3 else [found]
        tops = [side.topk(min(k, n), dim=1).values for side in sides]
        both = [torch.cat(pair, dim=1) for pair in zip(best, tops, strict=True)] if best else tops
        best = [x.topk(min(k, x.shape[1]), dim=1).values for x in both] if best else tops
    directions = (True, False) if ends == 3 else (ends == 1,)
    return [_unpacked(x, largest) for x, largest in zip(best, directions, strict=True)]


def _unpacked(best: Tensor, largest: bool) -> tuple[Tensor, Tensor]:
    """The scores and rows that keys are made of."""
    ordered = best >> 32 if largest else ~(best >> 32)
    bits = (ordered ^ (ordered >> 31 & 0x7FFFFFFF)).to(torch.int32)
    return bits.view(torch.float32), _LOW - (best & _LOW)


def _search_floats(queries: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """By keys, a range of rows after the other."""

    def keys_of(first: int, size: int) -> Tensor:
        return _scores(queries, rows, first, size, largest)

    return best_keys(queries.shape[0], rows.shape[0], k, 1 if largest else 2, keys_of)[0]


def scan_rows(queries: Tensor, rows: Tensor, k: int, ends: int) -> tuple[Tensor, Tensor]:
    """The raw operator: values and indices (ends, Q, k) of one or both ends, each row scored once.

    Scratch: that of `topk`, for both ends twice.
    """

    def search(part: Tensor) -> list[tuple[Tensor, Tensor]]:
        def keys_of(first: int, size: int) -> Tensor:
            return _scores(part, rows, first, size, bool(ends & 1))

        return best_keys(part.shape[0], rows.shape[0], k, ends, keys_of)

    return scanned(queries, rows.shape[0], k, ends, search)


def scanned(
    queries: Tensor, size: int, k: int, ends: int, search: Callable[[Tensor], list[tuple[Tensor, Tensor]]]
) -> tuple[Tensor, Tensor]:
    """Values and indices (ends, Q, k) of searches for some queries (or what stands for them) at a time."""
    if not 1 <= ends <= 3:
        raise ValueError(f"ends must be 1, 2 or 3, got {ends}")
    if not 0 <= k <= size <= _LOW:
        raise ValueError(
            f"k must be at most the number of rows, at most 2^32 - 1 on a GPU, got {k} and {size}"
        )
    shape = ((ends & 1) + (ends >> 1), queries.shape[0], k)
    values = torch.empty(shape, dtype=torch.float32, device=queries.device)
    indices = torch.empty(shape, dtype=torch.int64, device=queries.device)
    if k > 0:
        for part in (slice(q, q + _QUERIES) for q in range(0, queries.shape[0], _QUERIES)):
            for end, found in enumerate(search(queries[part])):
                values[end, part], indices[end, part] = found
    return values, indices


def _search_doubles(queries: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    """By a stable sort, in which what came earlier stands first."""
    best = torch.empty(queries.shape[0], 0, dtype=torch.float64, device=rows.device)
    index = best.to(torch.int64)
    for first, size in _ranges(queries.shape[0], rows.shape[0]):
        here = torch.arange(first, first + size, device=rows.device).expand(queries.shape[0], size)
        both = torch.cat([best, _scores(queries, rows, first, size, largest)], dim=1)
        best, order = both.sort(dim=1, descending=largest, stable=True)
        best, index = best[:, :k], torch.cat([index, here], dim=1).gather(1, order[:, :k])
    return best, index


def _project_case(pointer: str, dot: tl.dtype, scattered: bool = False, **more: Any) -> AotCase:
    pointers = {"g": pointer, "parts": "fp64" if dot == tl.float64 else "fp32"}
    blocks: dict[str, Any] = {"SCATTERED": scattered} if scattered else {"SCATTERED": False, "blocks": None}
    return AotCase(
        project_kernel,
        pointers | ({"blocks": "i64"} if scattered else {}),
        {"g_d": 1, "ROWS": 32, "COLS": 64, "RUN": RUN, "DOT": dot, "ACC": acc_dtype(dot), **blocks},
        num_warps=_sign_warps(dot),
        multiples_of_16=("dim", "g_b", "length"),
        **more,
    )


def _score_case(pointer: str, dot: tl.dtype, largest: bool, **more: Any) -> AotCase:
    tile = tile_for(128, 1 << 15, 1024, dot, accumulators=2)
    constants = {"q_d": 1, "r_d": 1, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "RUN": RUN}
    double = dot == tl.float64
    return AotCase(
        score_kernel,
        {"queries": pointer, "rows": pointer, "out": "fp64" if double else "i64"},
        constants | {"DOT": dot, "ACC": acc_dtype(dot), "KEYS": not double, "LARGEST": largest},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=("depth", "q_q", "r_r", "ld"),
        **more,
    )


AOT: Final = (
    _project_case("fp32", tl.float32),
    _project_case("fp32", tl.float32, scattered=True),
    _project_case("fp64", tl.float64, spills=True),
    _project_case("bf16", tl.bfloat16, tensor_cores=True),
    _project_case("fp16", tl.float16, tensor_cores=True),
    _score_case("fp32", tl.float32, True),
    _score_case("fp64", tl.float64, False, spills=True),
    _score_case("bf16", tl.bfloat16, True, tensor_cores=True),
    _score_case("fp16", tl.float16, False, tensor_cores=True),
)

"""Per-sample gradients of an embedding: tokens sorted by id, those that share one summed, no row kept in memory."""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    block_size,
    dot_dtype,
    launch_options,
    load_as,
    on_device,
    program,
    span,
    store_as,
    sum_parts,
)

_ROWS: Final = 8  # tokens of one id that are loaded at once
_COLS: Final = 256  # half of that in float64, which takes twice the registers
_RUN: Final = 256  # tokens whose sum is a chain; above that, sums of sums
_POSITIONS: Final = 16  # of one program of the inner products


@triton.jit
def run_sum(
    g, places, weights, begin, end, tokens, g_b, g_t, g_d, cols, width, WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr, RUN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The (weighted) sum of some columns of the gradients at places[begin:end]; a place is sample * tokens + token."""
    acc = tl.zeros((ROWS, cols.shape[0]), dtype=ACC)
    for start in range(begin, end, RUN):
        part = tl.zeros((ROWS, cols.shape[0]), dtype=ACC)
        for at in range(start, tl.minimum(end, start + RUN), ROWS):
            row = span(at, ROWS)
            place = tl.load(places + row, mask=row < end, other=0).to(tl.int64)
            sample = place // tokens
            from_row = g + sample * g_b + place % tokens * g_t
            inside = (row < end)[:, None] & (cols < width)[None, :]
            x = load_as(from_row[:, None] + cols[None, :] * g_d, inside, ACC)
            if WEIGHTED:
                # Where no row is loaded, an infinite weight times 0 would be NaN.
                x *= load_as(weights + sample, row < end, ACC)[:, None]
            part += x
        acc += part
    return tl.sum(acc, axis=0)


@triton.jit
def begins(keys, at, rows):
    """Whether a row of the table begins at this token of a sorted list; keys from `rows` on are no ids."""
    key = tl.load(keys + at).to(tl.int64)
    before = tl.load(keys + at - 1, mask=at > 0, other=-1).to(tl.int64)
    return (key < rows) & (key != before)


@triton.jit
def square_kernel(
    g, keys, places, ends, parts, tokens, width, rows, g_b, g_t, g_d, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[token, tile] = the square of the table's row that begins at this token of the sorted sample."""
    task = program(0)
    token = task // col_tiles
    first = token // tokens * tokens
    keys += first
    if begins(keys, token - first, rows):
        cols = span(task % col_tiles * COLS, COLS)
        end = tl.load(ends + token).to(tl.int64)
        places += first
        row = run_sum(
            g, places, g, token - first, end, tokens, g_b, g_t, g_d, cols, width, False, ROWS, RUN, ACC
        )
        tl.store(parts + task, tl.sum(row * row, axis=0))


@triton.jit
def find(keys, count, key, steps):
    """The first of `count` sorted keys that is not below `key`."""
    low, high = key * 0, key * 0 + count
    for _ in range(steps):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(keys + middle, mask=low < high, other=0).to(tl.int64) < key)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    return low


@triton.jit
def pair_kernel(
    g1, keys1, places1, ends1, g2, keys2, places2, ends2, parts, tokens1, tokens2, length1, length2, lists2,
    width, rows, g1_b, g1_t, g1_d, g2_b, g2_t, g2_d, chunks, steps,
    POSITIONS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """parts[i, j, chunk] = products of the rows that begin in a chunk of list i with the same rows of list j."""
    task = program(0)
    chunk, pair = task % chunks, task // chunks
    one, two = pair // lists2 * length1, pair % lists2 * length2
    keys1, places1, ends1 = keys1 + one, places1 + one, ends1 + one
    keys2, places2, ends2 = keys2 + two, places2 + two, ends2 + two
    acc = tl.zeros((COLS,), dtype=ACC)
    for at in range(chunk * POSITIONS, tl.minimum(length1, (chunk + 1) * POSITIONS)):
        if begins(keys1, at, rows):
            key = tl.load(keys1 + at).to(tl.int64)
            end = tl.load(ends1 + at).to(tl.int64)
            other = find(keys2, length2, key, steps)
            found = other < length2
            if tl.load(keys2 + other, mask=found, other=-1).to(tl.int64) == key:
                other_end = tl.load(ends2 + other).to(tl.int64)
                for column in range(0, width, COLS):
                    cols = span(column, COLS)
                    x = run_sum(
                        g1,
                        places1,
                        g1,
                        at,
                        end,
                        tokens1,
                        g1_b,
                        g1_t,
                        g1_d,
                        cols,
                        width,
                        False,
                        ROWS,
                        RUN,
                        ACC,
                    )
                    y = run_sum(
                        g2, places2, g2, other, other_end, tokens2, g2_b, g2_t, g2_d, cols, width, False,
                        ROWS, RUN, ACC,
                    )  # fmt: skip
                    acc += x * y
    tl.store(parts + task, tl.sum(acc, axis=0))


@triton.jit
def sum_kernel(
    g, keys, places, ends, weights, out, tokens, width, rows, g_b, g_t, g_d, col_tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, RUN: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """out[id] = the weighted sum of the gradients of its tokens, for the id that begins at a token of the list."""
    task = program(0)
    at = task // col_tiles
    if begins(keys, at, rows):
        cols = span(task % col_tiles * COLS, COLS)
        end = tl.load(ends + at).to(tl.int64)
        row = run_sum(g, places, weights, at, end, tokens, g_b, g_t, g_d, cols, width, True, ROWS, RUN, ACC)
        key = tl.load(keys + at).to(tl.int64)
        store_as(out + key * width + cols, row, cols < width)


class _Sorted(NamedTuple):
    """Lists of tokens in the order of their ids: (lists, length) each, ends relative to the list."""

    keys: Tensor
    places: Tensor
    ends: Tensor


def _sorted(ids: Tensor, rows: int, padding: int, *, together: bool = False) -> _Sorted:
    """The tokens of each sample, or of all samples `together`; padding and what is no id get the key `rows`."""
    keys = torch.where((ids >= 0) & (ids < rows) & (ids != padding), ids.long(), rows)
    keys = keys.reshape(1, -1) if together else keys
    keys, order = keys.contiguous().sort(dim=1, stable=True)
    places = order + torch.arange(keys.shape[0], device=ids.device)[:, None] * keys.shape[1]
    return _Sorted(keys, places, torch.searchsorted(keys, keys, right=True))


def _columns(width: int, acc: tl.dtype) -> int:
    return block_size(width, _COLS // (2 if acc == tl.float64 else 1))


def _accumulator(*g: Tensor) -> tuple[tl.dtype, torch.dtype]:
    acc = acc_dtype(dot_dtype(*g))
    return acc, torch.float64 if acc == tl.float64 else torch.float32


def embedding_sqnorms(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    """The raw operator: ids (B, T), g (B, T, d) -> (B,). Ids out of range have no gradient.

    Scratch: `32 B T` bytes for the sorted tokens and `4 B T` for every 256 columns.
    """
    batch, tokens, width = g.shape
    acc, dtype = _accumulator(g)
    if 0 in g.shape:
        return g.new_zeros(batch, dtype=dtype)
    cols = _columns(width, acc)
    col_tiles = triton.cdiv(width, cols)
    parts = g.new_zeros(batch, tokens * col_tiles, dtype=dtype)
    with on_device(g):
        tokens_of = _sorted(ids, num_embeddings, padding_idx)
        square_kernel[(parts.numel(),)](
            g, *tokens_of, parts, tokens, width, num_embeddings, *g.stride(), col_tiles,
            ROWS=_ROWS, COLS=cols, RUN=_RUN, ACC=acc, **launch_options(),
        )  # fmt: skip
    return sum_parts(parts, dtype)


def embedding_dots(
    ids1: Tensor, g1: Tensor, ids2: Tensor, g2: Tensor, num_embeddings: int, padding_idx: int, summed: bool
) -> Tensor:
    """The raw operator: (B1, B2), or (B1,) where `summed`.

    Scratch: `32 (B1 T1 + B2 T2)` bytes for the sorted tokens and `4 B1 B2` for every 16 tokens of side 1.
    """
    (batch, tokens, width), lists = g1.shape, 1 if summed else g2.shape[0]
    acc, dtype = _accumulator(g1, g2)
    shape = (batch,) if summed else (batch, lists)
    if 0 in g1.shape or 0 in g2.shape:
        return g1.new_zeros(shape, dtype=dtype)
    chunks, length = triton.cdiv(tokens, _POSITIONS), g2.shape[1] * (g2.shape[0] if summed else 1)
    parts = torch.empty(batch * lists, chunks, dtype=dtype, device=g1.device)
    with on_device(g1):
        one = _sorted(ids1, num_embeddings, padding_idx)
        two = _sorted(ids2, num_embeddings, padding_idx, together=summed)
        pair_kernel[(parts.numel(),)](
            g1, *one, g2, *two, parts, tokens, g2.shape[1], tokens,
            length, lists, width, num_embeddings, *g1.stride(), *g2.stride(), chunks, length.bit_length(),
            POSITIONS=_POSITIONS, ROWS=_ROWS, COLS=_columns(width, acc), RUN=_RUN, ACC=acc,
            **launch_options(),
        )  # fmt: skip
    return sum_parts(parts, dtype).reshape(shape)


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, w: Tensor, num_embeddings: int, padding_idx: int, wide: bool
) -> Tensor:
    """The raw operator: (V, d) in the type of `g`, or of its sums where `wide`.

    Scratch: `32 B T` bytes for the sorted tokens.
    """
    batch, tokens, width = g.shape
    acc, dtype = _accumulator(g)
    out = g.new_zeros(num_embeddings, width, dtype=dtype if wide else g.dtype)
    if 0 in g.shape:
        return out
    cols = _columns(width, acc)
    col_tiles = triton.cdiv(width, cols)
    with on_device(g):
        tokens_of = _sorted(ids, num_embeddings, padding_idx, together=True)
        sum_kernel[(batch * tokens * col_tiles,)](
            g, *tokens_of, w.contiguous(), out, tokens, width, num_embeddings, *g.stride(), col_tiles,
            ROWS=_ROWS, COLS=cols, RUN=_RUN, ACC=acc, **launch_options(),
        )  # fmt: skip
    return out


_LIST: Final = ("keys", "places", "ends")


def _case(
    kernel: Any, dtype: str, pointers: dict[str, str], sides: tuple[str, ...] = ("",), **more: int
) -> AotCase:
    """Contiguous rows of 768 columns."""
    for side in sides:
        pointers = {f"g{side}": dtype, **{f"{name}{side}": "i64" for name in _LIST}, **pointers}
    constants = {f"g{side}_d": 1 for side in sides}
    acc = acc_dtype(DTYPES[dtype])
    blocks = {"ROWS": _ROWS, "COLS": _columns(768, acc), "RUN": _RUN, "ACC": acc}
    aligned = tuple(f"g{side}_{stride}" for side in sides for stride in "bt")
    return AotCase(kernel, pointers, {**constants, **blocks, **more}, multiples_of_16=("width", *aligned))


AOT: Final = (
    *(
        _case(square_kernel, t, {"parts": "fp64" if t == "fp64" else "fp32"})
        for t in ("fp32", "bf16", "fp64")
    ),
    *(
        _case(pair_kernel, t, {"parts": "fp64" if t == "fp64" else "fp32"}, ("1", "2"), POSITIONS=_POSITIONS)
        for t in ("fp32", "bf16", "fp64")
    ),
    *(_case(sum_kernel, t, {"weights": "fp64", "out": t}) for t in ("fp32", "bf16", "fp64")),
)

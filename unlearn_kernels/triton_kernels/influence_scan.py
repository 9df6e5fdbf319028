"""Scan of rows stored as integers: products of 8-bit integers on the tensor cores, exact, scaled a block at a time."""

from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels.aot import AotCase
from unlearn_kernels.triton_kernels.common import block_size, launch_options, on_device, program, span
from unlearn_kernels.triton_kernels.influence import best_keys, keys, scanned

_ROWS: Final = 128
_MOST_QUERIES: Final = 64  # of a tile: three accumulators of 32 bits each
_MOST_DEPTH: Final = 128  # bytes of a row that are multiplied at once
_LEAST_DEPTH: Final = 32  # that the tensor cores take
_STAGES: Final = 3


@triton.jit
def code_score_kernel(
    rows, scales, pieces, out, count, size, first, row_bytes, block_bytes, blocks, apart, ld, query_tiles,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
    NIBBLES: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """out[q, n] = the key that orders the score of row first + n.

    `pieces` holds the halves of the queries' codes, `apart` from one another: high ones, then low ones; for nibbles
    those of even columns before those of odd ones. A block of columns has CHUNKS DEPTH places in them, zero where
    it has no column, so that what is read of a row beyond its block counts for nothing.
    """
    tile = program(0)
    row = span(tile // query_tiles * ROWS, ROWS)
    query = span(tile % query_tiles * QUERIES, QUERIES)
    k = tl.arange(0, DEPTH)
    row_inside, query_inside = row < size, query < count
    row_at = rows + (first + row)[:, None] * row_bytes + k[None, :]
    scale_at = scales + (first + row) * blocks
    query_at = pieces + query[None, :] * (blocks * (CHUNKS * DEPTH)) + k[:, None]
    acc = tl.zeros((ROWS, QUERIES), dtype=tl.float32)
    for n in range(0, blocks):
        high = tl.zeros((ROWS, QUERIES), dtype=tl.int32)
        low = tl.zeros((ROWS, QUERIES), dtype=tl.int32)
        for c in tl.static_range(CHUNKS):
            byte = n * block_bytes + c * DEPTH
            inside = row_inside[:, None] & (k < row_bytes - byte)[None, :]
            code = tl.load(row_at + byte, mask=inside, other=0).to(tl.uint8)
            at = query_at + (n * CHUNKS + c) * DEPTH
            if NIBBLES:
                even, odd = (code & 15).to(tl.int8) - 8, (code >> 4).to(tl.int8) - 8
                high, low = add_halves(high, low, even, at, apart, query_inside)
                high, low = add_halves(high, low, odd, at + 2 * apart, apart, query_inside)
            else:
                signed = (code ^ 128).to(tl.int8, bitcast=True)  # code - 128
                high, low = add_halves(high, low, signed, at, apart, query_inside)
        scale = tl.load(scale_at + n, mask=row_inside, other=0.0).to(tl.float32)
        acc = tl.fma((high * 128 + low).to(tl.float32), tl.broadcast_to(scale[:, None], (ROWS, QUERIES)), acc)
    to = out + query[None, :] * ld + row[:, None]
    index = first + row[:, None]
    tl.store(to, keys(acc, index, LARGEST), mask=row_inside[:, None] & query_inside[None, :])


@triton.jit
def add_halves(high, low, x, at, apart, query_inside):
    """The two sums with the products of x and the high and low halves of the queries at `at`."""
    y = tl.load(at, mask=query_inside[None, :], other=0).to(tl.int8)
    z = tl.load(at + apart, mask=query_inside[None, :], other=0).to(tl.int8)
    high = tl.dot(x, y, high, input_precision="ieee", out_dtype=tl.int32)
    return high, tl.dot(x, z, low, input_precision="ieee", out_dtype=tl.int32)


class Blocks(NamedTuple):
    """How the columns that share a scale lie in bytes: CHUNKS times DEPTH places for `width` bytes."""

    width: int
    depth: int
    chunks: int

    @staticmethod
    def of(block: int, nibbles: bool) -> "Blocks":
        """For a block of columns."""
        width = block // 2 if nibbles else block
        depth = block_size(width, _MOST_DEPTH, _LEAST_DEPTH)
        return Blocks(width, depth, triton.cdiv(width, depth))


def query_pieces(codes: Tensor, block: int, nibbles: bool) -> Tensor:
    """Codes (Q, D) int16 as int8 (2 or 4, Q, places): 128 high + low, for nibbles of even, then of odd columns."""
    lay, count = Blocks.of(block, nibbles), triton.cdiv(codes.shape[1], block)
    padded = torch.nn.functional.pad(codes, (0, count * block - codes.shape[1]))
    steps = 2 if nibbles else 1
    columns = padded.view(len(codes), count, lay.width, steps).permute(3, 0, 1, 2)
    high = columns + 64 >> 7
    halves = torch.stack((high, columns - high * 128), dim=1).to(torch.int8)
    placed = torch.nn.functional.pad(halves, (0, lay.depth * lay.chunks - lay.width))
    return placed.reshape(2 * steps, len(codes), count * lay.depth * lay.chunks)


def scan_codes(
    codes: Tensor, query_scales: Tensor, rows: Tensor, scales: Tensor, block: int, k: int, nibbles: bool, ends: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The raw operator: values and indices (ends, Q, k), bit for bit those of the CPU's tiles.

    Sums of a block are exact in 32 bits; each is rounded to float32 and added, times its scale, with one rounding.

    Scratch: 32 MB of keys, for both ends twice, and `2 Q D` bytes of the queries' halves.
    """
    if not (0 < block <= 256 and block % 2 == 0):
        raise ValueError(f"block must be even and at most 256, got {block}")
    rows, scales = rows.contiguous(), scales.contiguous()

    def search(part: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = query_pieces(part, block, nibbles)

        def keys_of(first: int, size: int) -> Tensor:
            return _keys(pieces, rows, scales, block, nibbles, first, size, bool(ends & 1))

        return best_keys(len(part), len(rows), k, ends, keys_of)

    values, indices = scanned(codes, len(rows), k, ends, search)
    return values * query_scales[:, None], indices


def _keys(
    pieces: Tensor, rows: Tensor, scales: Tensor, block: int, nibbles: bool, first: int, size: int, largest: bool
) -> Tensor:  # fmt: skip
    """Keys (Q, size) of `size` rows from `first`."""
    lay, count = Blocks.of(block, nibbles), pieces.shape[1]
    out = torch.empty(count, size, dtype=torch.int64, device=rows.device)
    tall = block_size(size, _ROWS)
    wide = block_size(count, _MOST_QUERIES)
    query_tiles = triton.cdiv(count, wide)
    with on_device(rows):
        code_score_kernel[(triton.cdiv(size, tall) * query_tiles,)](
            rows, scales, pieces, out, count, size, first, rows.shape[1], lay.width, scales.shape[1],
            pieces.stride(0), out.stride(0), query_tiles, ROWS=tall, QUERIES=wide, DEPTH=lay.depth,
            CHUNKS=lay.chunks, NIBBLES=nibbles, LARGEST=largest, **launch_options(_warps(tall, wide), _STAGES),
        )  # fmt: skip
    return out


def _warps(tall: int, wide: int) -> int:
    return 8 if tall * wide > 4096 else 4


def _case(queries: int, block: int, nibbles: bool, largest: bool, **more: Any) -> AotCase:
    lay = Blocks.of(block, nibbles)
    tile = {"ROWS": _ROWS, "QUERIES": queries, "DEPTH": lay.depth, "CHUNKS": lay.chunks}
    return AotCase(
        code_score_kernel,
        {"rows": "u8", "scales": "fp32", "pieces": "i8", "out": "i64"},
        tile | {"NIBBLES": nibbles, "LARGEST": largest},
        num_warps=_warps(_ROWS, queries),
        num_stages=_STAGES,
        multiples_of_16=("row_bytes", "block_bytes", "apart", "ld"),
        tensor_cores=True,
        **more,
    )


AOT: Final = (
    _case(64, 128, False, True),
    _case(64, 256, False, False),
    _case(64, 128, True, True),
    _case(16, 128, False, True),
    _case(16, 128, True, True),
)

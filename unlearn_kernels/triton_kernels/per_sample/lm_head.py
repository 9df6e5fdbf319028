"""Per-sample gradients of a language-model head, `W_i = Q_i^T H_i`, with no logits in memory.

Norms and inner products are sums over the vocabulary: for a block of it at a time, Q = upstream (softmax - onehot),
then the kernels of a linear layer whose output gradient that is. Rows that do not count stay in place with Q = 0.
"""

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.triton_kernels import token_loss
from unlearn_kernels.triton_kernels.aot import DTYPES, AotCase
from unlearn_kernels.triton_kernels.common import (
    Tile,
    acc_dtype,
    add_product,
    dot_dtype,
    hadamard_sum,
    load_as,
    on_device,
    program,
    span,
    sum_parts,
    tile_for,
)
from unlearn_kernels.triton_kernels.per_sample.linear import linear_sqnorms
from unlearn_kernels.triton_kernels.per_sample.linear_dots import linear_dots

# Bytes of Q at a time.
_BLOCK_BYTES: Final = 64 << 20


class _Side(NamedTuple):
    """Tokens with those that do not count made harmless: h, upstream and Q are 0 there."""

    rows: token_loss.Rows
    upstream: Tensor
    lse: Tensor
    shape: torch.Size

    @property
    def h(self) -> Tensor:
        """Hidden states, (B, T, d)."""
        return self.rows.h.view(*self.shape, self.rows.h.shape[1])

    def blocks(self, columns: int) -> Iterator[Tensor]:
        """Q of one block of the vocabulary after the other, (B, T, columns), in memory that they share."""
        n, vocabulary = self.rows.h.shape[0], self.rows.weight.shape[0]
        memory = self.h.new_empty(n * columns, dtype=self.rows.dtype)
        for begin in range(0, vocabulary, columns):
            size = min(columns, vocabulary - begin)
            q = memory[: n * size].view(n, size)
            if n > 0:
                token_loss._probabilities(self.rows, self.upstream, self.lse, q, begin, size, 1.0, 0.0)
            yield q.view(*self.shape, size)


def _side(
    h: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    lse: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
) -> _Side:
    if lse is None:
        _, lse, _ = token_loss.linear_nll_forward(h, weight, bias, labels, ignore_index, 1.0, 0.0, 0)
    gone = labels == ignore_index
    upstream = torch.ones_like(lse) if upstream is None else upstream
    rows = h.masked_fill(gone.unsqueeze(-1), 0).reshape(-1, h.shape[-1])
    flat = labels.masked_fill(gone, 0).reshape(-1)
    kept = torch.full((), flat.numel(), dtype=torch.int64, device=h.device)
    return _Side(
        token_loss.Rows(rows, weight, bias, flat, flat, kept),
        upstream.masked_fill(gone, 0).reshape(-1),
        lse.masked_fill(gone, float("inf")).reshape(-1),
        labels.shape,
    )


def _columns(rows: int, vocabulary: int, dtype: torch.dtype) -> int:
    return min(vocabulary, max(512, _BLOCK_BYTES // (dtype.itemsize * max(rows, 1)) // 128 * 128))


def lm_head_sqnorms(
    h: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    lse: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    method: int,
) -> Tensor:
    """The raw operator: h (B, T, d), labels (B, T), weight (V, d) -> (B,).

    Scratch: a copy of h, 64 MB of Q (at least 512 columns), and that of the norms of a linear layer.
    """
    side = _side(h, labels, upstream, lse, weight, bias, ignore_index)
    (batch, tokens), (vocabulary, d) = labels.shape, weight.shape
    if tokens == 1 and method != 0:
        method = 2
    elif method == 3 and (tokens + 16) / 2 * (d + vocabulary) >= d * vocabulary:
        method = 0
    norms = h.new_zeros(batch, dtype=torch.float64)
    with on_device(h):
        for q in side.blocks(_columns(batch * tokens, vocabulary, side.rows.dtype)):
            norms += linear_sqnorms(side.h, q, bias is not None, method)
    return norms.to(side.rows.dtype)


def lm_head_dots(
    h1: Tensor,
    labels1: Tensor,
    upstream1: Tensor | None,
    lse1: Tensor | None,
    h2: Tensor,
    labels2: Tensor,
    upstream2: Tensor | None,
    lse2: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    summed: bool,
    method: int,
) -> Tensor:
    """The raw operator: -> (B1, B2), or (B1,) with the sum of side 2.

    Scratch: copies of h1 and h2, 64 MB of Q of both sides (at least 512 columns), and that of a linear layer's dots.
    """
    head = weight, bias, ignore_index
    left, right = _side(h1, labels1, upstream1, lse1, *head), _side(h2, labels2, upstream2, lse2, *head)
    (b1, n), (b2, m), (vocabulary, d) = labels1.shape, labels2.shape, weight.shape
    n, m, pairs = b1 * n, b2 * m, b1 * (1 if summed else b2)
    if method == 3:
        method = int(n * m * (vocabulary + d) <= (n + m + pairs) * vocabulary * d)
    out = h1.new_zeros((b1,) if summed else (b1, b2), dtype=torch.float64)
    columns = _columns(n + m, vocabulary, left.rows.dtype)
    with on_device(h1):
        for p, q in zip(left.blocks(columns), right.blocks(columns), strict=True):
            out += linear_dots(left.h, p, right.h, q, summed, bias is not None, 1 - method)
    return out.to(left.rows.dtype)


@triton.jit
def tied_dots_kernel(
    h, weight, bias, ids, g, labels, upstream, lse, parts, h_b, h_t, h_d, w_v, w_d, b_v, g_b, g_t, g_d, tokens,
    length, vocabulary, features, padding, col_tiles, tiles,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, DOT_W: tl.constexpr, DOT_G: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """parts[b, tile] = sum over a tile of q[s, ids[t]] (h_s . g_t); ids, labels, upstream, lse are contiguous."""
    task = program(0)
    sample, tile = task // tiles, task % tiles
    rows, cols = span(tile // col_tiles * ROWS, ROWS), span(tile % col_tiles * COLS, COLS)
    h += sample * h_b
    g += sample * g_b
    id = tl.load(ids + sample * length + cols, mask=cols < length, other=padding).to(tl.int64)
    wrong = (id < 0) | (id >= vocabulary)
    column = tl.where(wrong, 0, id)
    zeros = tl.zeros((ROWS, COLS), dtype=ACC)
    z = add_product(
        zeros, h, h_t, h_d, rows, tokens, weight, w_v, w_d, column, vocabulary, features, DEPTH, DOT_W
    )
    if bias is not None:
        z += load_as(bias + column * b_v, cols < length, ACC)[None, :]
    at, inside = sample * tokens + rows, rows < tokens
    label = tl.load(labels + at, mask=inside, other=0).to(tl.int64)
    u = load_as(upstream + at, inside, ACC)
    u = tl.where((label >= 0) & (label < vocabulary), u, float("nan"))
    q = tl.exp(z - load_as(lse + at, inside, ACC)[:, None])
    q = (q - tl.where(id[None, :] == label[:, None], 1.0, 0.0)) * u[:, None]
    q = tl.where(wrong[None, :], float("nan"), q)
    counts = inside[:, None] & ((cols < length) & (id != padding))[None, :]
    product = add_product(zeros, h, h_t, h_d, rows, tokens, g, g_t, g_d, cols, length, features, DEPTH, DOT_G)
    tl.store(parts + task, hadamard_sum(tl.where(counts, q, 0.0), tl.where(counts, product, 0.0)))


def lm_head_tied_dots(
    ids: Tensor,
    g: Tensor,
    h: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    lse: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    padding_idx: int,
    ignore_index: int,
) -> Tensor:
    """The raw operator: ids (B, S), g (B, S, d), h (B, T, d) -> (B,).

    Scratch: a copy of h, and 4 B bytes for every tile of S x T (8 for float64).
    """
    side = _side(h, labels, upstream, lse, weight, bias, ignore_index)
    (batch, tokens), length, (vocabulary, d) = labels.shape, ids.shape[1], weight.shape
    rows, h = side.rows, side.h
    if h.numel() == 0 or g.numel() == 0:
        return h.new_zeros(batch, dtype=rows.dtype)
    dots = dot_dtype(h, weight), dot_dtype(h, g)
    tile = _tied_tile(tokens, length, d, *dots)
    col_tiles = triton.cdiv(length, tile.cols)
    tiles = triton.cdiv(tokens, tile.rows) * col_tiles
    parts = h.new_empty(batch, tiles, dtype=rows.dtype)
    with on_device(h):
        tied_dots_kernel[(batch * tiles,)](
            h, weight, bias, ids.contiguous(), g, rows.labels, side.upstream, side.lse, parts, *h.stride(),
            *weight.stride(), 0 if bias is None else bias.stride(0), *g.stride(), tokens, length, vocabulary, d,
            padding_idx, col_tiles, tiles, tile.rows, tile.cols, tile.depth, *dots, acc_dtype(dots[0]),
            **tile.launch(),
        )  # fmt: skip
        return sum_parts(parts, rows.dtype)


def _tied_tile(rows: int, cols: int, depth: int, *dots: tl.dtype) -> Tile:
    """The block of a program with two accumulators, for the wider of its operands."""
    widest = max(dots, key=lambda dot: dot.primitive_bitwidth)
    tile = tile_for(rows, cols, depth, widest, accumulators=2)
    narrow = min(tile.cols, 32 if widest == tl.float64 else 64)
    return tile._replace(cols=narrow)


def _case(dtype: str, **constants: Any) -> AotCase:
    dot, acc = DTYPES[dtype], acc_dtype(DTYPES[dtype])
    tile = _tied_tile(1024, 1024, 1024, dot, dot)
    pointers = dict.fromkeys(("h", "weight", "bias", "g"), dtype) | {"ids": "i64", "labels": "i64"}
    pointers |= dict.fromkeys(("upstream", "lse", "parts"), str(acc))
    fixed = {
        "h_d": 1,
        "w_d": 1,
        "b_v": 1,
        "g_d": 1,
        "ROWS": tile.rows,
        "COLS": tile.cols,
        "DEPTH": tile.depth,
    }
    fixed |= {"DOT_W": dot, "DOT_G": dot, "ACC": acc, **constants}
    return AotCase(
        tied_dots_kernel,
        {name: kind for name, kind in pointers.items() if name not in constants},
        fixed,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        multiples_of_16=("h_b", "h_t", "w_v", "g_b", "g_t", "tokens", "length", "vocabulary", "features"),
        tensor_cores=dtype == "bf16",
    )


AOT: Final = (*(_case(dtype) for dtype in ("fp32", "bf16", "fp64")), _case("fp16", bias=None))

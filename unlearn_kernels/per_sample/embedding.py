r"""Per-sample gradients of an embedding: row v of `W_i` is `\sum_{t : ids_{it} = v} g_{it}`, mostly zero."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, select
from unlearn_kernels._checks import check_range
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample._checks import check_floats, check_weights, folded
from unlearn_kernels.per_sample._types import Gradients, TwoSided
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import embedding as reference

_NO_PADDING: Final = -(1 << 62)
_PROJECTED_AT_ONCE: Final = 1 << 20  # elements


def _fake_sqnorms(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    return g.new_empty(g.shape[0], dtype=accumulation_dtype(g))


def _fake_dots(
    ids1: Tensor, g1: Tensor, ids2: Tensor, g2: Tensor, num_embeddings: int, padding_idx: int, summed: bool
) -> Tensor:
    shape = g1.shape[:1] if summed else (g1.shape[0], g2.shape[0])
    return g1.new_empty(shape, dtype=accumulation_dtype(g1, g2))


def _fake_weighted_sum(
    ids: Tensor, g: Tensor, w: Tensor, num_embeddings: int, padding_idx: int, wide: bool
) -> Tensor:
    return g.new_empty(num_embeddings, g.shape[2], dtype=accumulation_dtype(g) if wide else g.dtype)


def _triton_sqnorms(*arguments: Any) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import embedding as kernels

    return kernels.embedding_sqnorms(*arguments)


def _triton_dots(*arguments: Any) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import embedding as kernels

    return kernels.embedding_dots(*arguments)


def _triton_weighted_sum(*arguments: Any) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import embedding as kernels

    return kernels.embedding_weighted_sum(*arguments)


_ops.register_operator(
    "embedding_sqnorms",
    "per_sample",
    "sum_v |sum_{t: i_t = v} g_t|^2",
    reference=reference.embedding_sqnorms,
    fake=_fake_sqnorms,
    triton=_triton_sqnorms,
)
_ops.register_operator(
    "embedding_dots",
    "per_sample",
    "sum_v <sum_{t: i_t = v} g_t, sum_{s: j_s = v} h_s>",
    reference=reference.embedding_dots,
    fake=_fake_dots,
    triton=_triton_dots,
)
_ops.register_operator(
    "embedding_weighted_sum",
    "per_sample",
    "row v: sum_b w_b sum_{t: i_bt = v} g_bt",
    reference=reference.embedding_weighted_sum,
    fake=_fake_weighted_sum,
    triton=_triton_weighted_sum,
)


def _folded(
    ids: Tensor, G: Tensor, num_embeddings: int, names: tuple[str, str] = ("ids", "G")
) -> tuple[Tensor, Tensor]:
    """ids (B, T) and G (B, T, d), with position ids repeated for every sample."""
    name, g_name = names
    check_floats(**{g_name: G})
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {ids.dtype}")
    if ids.device != G.device:
        raise ValueError(f"{name} and {g_name} must be on one device, got {ids.device} and {G.device}")
    shape = G.shape[:-1]
    if ids.shape not in (shape, (1, *shape[1:]), shape[1:]):
        raise ValueError(
            f"{name} must have the shape of {g_name} without its last dimension, {tuple(shape)}, or that of "
            f"one sample, got {tuple(ids.shape)}"
        )
    check_range(name, ids, num_embeddings)
    g = folded(G)
    return ids.expand(shape).reshape(g.shape[:2]), g.detach()


def _padding(num_embeddings: int, padding_idx: int | None) -> int:
    """What the kernels take for `padding_idx`."""
    if num_embeddings < 0:
        raise ValueError(f"num_embeddings must not be negative, got {num_embeddings}")
    if padding_idx is None:
        return _NO_PADDING
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must be in [{-num_embeddings}, {num_embeddings}) or None, got {padding_idx}"
        )
    return padding_idx % num_embeddings


def sqnorms(
    ids: Tensor,
    G: Tensor,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Squared norms of per-sample gradients of an embedding, with no gradient in memory.

    .. math:: n_i = \sum_v \Big\| \sum_{t : ids_{it} = v} g_{it} \Big\|^2

    A sample's tokens are sorted by id (radix sort, linear time), and those that share an id are summed: `G` is
    read once, `B T d` additions, instead of `B T^2 d` products with a T x T mask.

    Args:
        ids: what was looked up, int32 or int64, any strides: (B, ...), or (1, ...) or (...) for ids that all
            samples share (positions).
        G: gradients at the embedding's outputs, (B, ..., d); float32, float64, bfloat16 or float16. What lies
            between the first dimension and the last is summed over (T tokens).
        num_embeddings: rows of the table, V.
        padding_idx: the id whose row gets no gradient, as in `torch.nn.Embedding`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,), float32 (float64 for float64), accumulated in that type and, over more than 32 tokens of one id,
        in double. The same bits at every thread count. Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or an id is out of range. The range is looked up on
            the host (on a GPU, that waits for the device); code compiled by `torch.compile` leaves it to the
            kernels: a RuntimeError on the CPU, tokens without a gradient on a GPU.

    Scratch: `16 (B + threads) T` bytes and 12 KB a thread, whatever d and V.

    Sources: Li et al. 2022 (arXiv 2110.05679) for the norm; the T x T mask that this replaces is theirs.
    """
    padding = _padding(num_embeddings, padding_idx)
    ids, g = _folded(ids, G, num_embeddings)
    return select("embedding_sqnorms", backend, (g, ids))(ids, g, num_embeddings, padding)


def dots(
    ids1: Tensor,
    G1: Tensor,
    ids2: Tensor,
    G2: Tensor,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
    summed: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of per-sample gradients of one embedding, over the ids that two samples have in common.

    .. math:: D_{ij} = \sum_v \Big\langle \sum_{t : ids^1_{it} = v} g^1_{it}, \sum_{s : ids^2_{js} = v} g^2_{js}
        \Big\rangle

    Both sides are sorted by id and walked together, so that every token is summed once and no
    B x V x d is formed. The two sides may be two uses of one shared table in the same samples: then
    the diagonal is the cross term of `|W_i + W'_i|^2`, which `sqnorms` of the tokens of both, put one after the
    other, gives with less work.

    Args:
        ids1: ids of side 1, as in `sqnorms`.
        G1: gradients of side 1, (B1, ..., d).
        ids2: ids of side 2.
        G2: gradients of side 2, (B2, ..., d); T may differ from side 1.
        num_embeddings: rows of the table.
        padding_idx: the id whose row gets no gradient.
        summed: multiplies every sample of side 1 by the one sum of all gradients of side 2.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B1, B2), or (B1,) where `summed`; float32 (float64 for float64). Not differentiable.

    Raises:
        ValueError: as `sqnorms`, or if the sides do not fit each other.

    Scratch: `32 (B1 T1 + B2 T2)` bytes, at most 1 MB or `8 B1 B2` bytes of partial sums, and
    `1 KB (B1 + B2)` a thread.
    """
    padding = _padding(num_embeddings, padding_idx)
    check_floats(G1=G1, G2=G2)
    if G1.shape[-1] != G2.shape[-1]:
        raise ValueError(
            f"G1 and G2 must have the same last dimension, got {G1.shape[-1]} and {G2.shape[-1]}"
        )
    ids1, g1 = _folded(ids1, G1, num_embeddings, ("ids1", "G1"))
    ids2, g2 = _folded(ids2, G2, num_embeddings, ("ids2", "G2"))
    call = select("embedding_dots", backend, (g1, g2, ids1, ids2))
    return call(ids1, g1, ids2, g2, num_embeddings, padding, summed)


def weighted_sum(
    ids: Tensor,
    G: Tensor,
    w: Tensor,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Gradients:
    r"""The weighted sum of per-sample gradients, `\sum_i w_i W_i`: no second backward, no one-hot matrix.

    Args:
        ids: as in `sqnorms`.
        G: gradients at the embedding's outputs, (B, ..., d).
        w: one weight a sample, (B,).
        num_embeddings: rows of the table.
        padding_idx: the id whose row gets no gradient.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        `Gradients(weight, None)` with the table's gradient (V, d), dense, in the dtype of `G`, accumulated in
        float32 (float64). Tokens are added in the order of samples and positions: the same bits every time.

    Raises:
        ValueError: as `sqnorms`, or if `w` does not fit.

    Scratch: `32 B T` bytes and 12 KB a thread.

    Source: book-keeping, Bu et al. 2023 (arXiv 2210.00038).
    """
    padding = _padding(num_embeddings, padding_idx)
    ids, g = _folded(ids, G, num_embeddings)
    check_weights(w, g, g.shape[0])
    call = select("embedding_weighted_sum", backend, (g, ids, w))
    return Gradients(call(ids, g, w.detach().double(), num_embeddings, padding, False), None)


def grads(
    ids: Tensor,
    G: Tensor,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Gradients:
    """Per-sample gradients, dense: `B V d` numbers, of which at most `B T d` are not zero.

    It is the weighted sum over a table of B V rows, one table a sample.

    Args:
        ids: as in `sqnorms`.
        G: gradients at the embedding's outputs, (B, ..., d).
        num_embeddings: rows of the table.
        padding_idx: the id whose row gets no gradient.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        `Gradients(weight, None)`, weight (B, V, d), float32 (float64 for float64).

    Raises:
        ValueError: as `sqnorms`.

    Scratch: `40 B T` bytes and 12 KB a thread.
    """
    padding = _padding(num_embeddings, padding_idx)
    ids, g = _folded(ids, G, num_embeddings)
    rows = _rows(torch.where(ids == padding, -1, ids.long()), g, num_embeddings, backend)
    return Gradients(rows, None)


def _rows(ids: Tensor, g: Tensor, rows: int, backend: Backend | None) -> Tensor:
    """The gradients (B, rows, d) of tables of so many rows; tokens of the id -1 have none."""
    batch = g.shape[0]
    table = torch.arange(batch, device=ids.device)[:, None] * rows
    call = select("embedding_weighted_sum", backend, (g, ids))
    ones = torch.ones(batch, dtype=torch.float64, device=g.device)
    out = call(torch.where(ids < 0, -1, ids + table), g, ones, batch * rows, -1, True)
    return out.reshape(batch, rows, g.shape[2])


def project(
    ids: Tensor,
    G: Tensor,
    projection: Projection | TwoSided,
    *,
    num_embeddings: int,
    padding_idx: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Projections of per-sample gradients, from the rows that some sample touches.

    A `Projection` is applied to those rows a megabyte at a time, with the signs that the whole gradient,
    flattened row by row, would meet: `k d U` sign products for U different ids in the batch. `TwoSided` needs no
    row at all, `L W_i R^T = \sum_t L_{:, ids_{it}} (R g_{it})^T`: two products of all tokens.

    Args:
        ids: as in `sqnorms`.
        G: gradients at the embedding's outputs, (B, ..., d).
        projection: a `Projection` of `num_embeddings * d` coordinates, or `TwoSided` with left (k_o, V) and
            right (k_i, d).
        num_embeddings: rows of the table.
        padding_idx: the id whose row gets no gradient.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, k), or (B, k_o k_i) for `TwoSided`; float32 (float64 for float64).

    Raises:
        ValueError: as `sqnorms`, or if the projection does not fit.

    Scratch: `4 MB` of rows or `4 B d` bytes, and what `Projection` needs; `8 B T (k_o + k_i)` for `TwoSided`.
    """
    padding = _padding(num_embeddings, padding_idx)
    ids, g = _folded(ids, G, num_embeddings)
    if isinstance(projection, TwoSided):
        return _two_sided(ids, g, projection, num_embeddings, padding)
    if projection.dim != num_embeddings * g.shape[2]:
        raise ValueError(
            f"projection must have dim num_embeddings * d = {num_embeddings * g.shape[2]}, got {projection.dim}"
        )
    return _projected(ids, g, projection, 0, padding, backend)


def project_part(
    ids: Tensor,
    G: Tensor,
    projection: Projection,
    offset: int,
    num_embeddings: int,
    padding_idx: int | None = None,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """What a table of embeddings that begins at coordinate `offset` of a flattened model adds to a projection.

    Args:
        ids: as in `sqnorms`.
        G: gradients at the embedding's outputs, (B, ..., d).
        projection: of the whole model.
        offset: where the table begins.
        num_embeddings: rows of the table.
        padding_idx: the id whose row gets no gradient.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, k); float32 (float64 for float64).

    Raises:
        ValueError: as `sqnorms`, or if the table does not lie within the projection's coordinates.

    Scratch: that of `project`.
    """
    padding = _padding(num_embeddings, padding_idx)
    ids, g = _folded(ids, G, num_embeddings)
    if offset + num_embeddings * g.shape[2] > projection.dim:
        raise ValueError(
            f"projection must have dim {offset + num_embeddings * g.shape[2]} or more, got {projection.dim}"
        )
    return _projected(ids, g, projection, offset, padding, backend)


def _projected(
    ids: Tensor, g: Tensor, projection: Projection, offset: int, padding: int, backend: Backend | None
) -> Tensor:
    out = g.new_zeros(g.shape[0], projection.k, dtype=accumulation_dtype(g))
    for rows, touched in _touched(ids, g, padding, backend):
        out += projection.project_rows(touched, rows, offset=offset, backend=backend)
    return out


def _touched(
    ids: Tensor, g: Tensor, padding: int, backend: Backend | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some ids of the batch at a time, in order, and their rows of every sample's gradient, (B, n, d)."""
    known, place = torch.unique(torch.where(ids == padding, -1, ids.long()), return_inverse=True)
    first = int((known < 0).sum())
    step = max(1, _PROJECTED_AT_ONCE // max(1, g.shape[0] * g.shape[2]))
    for begin in range(first, len(known), step):
        rows = known[begin : begin + step]
        here = (place >= begin) & (place < begin + step)
        yield rows, _rows(torch.where(here, place - begin, -1), g, len(rows), backend)


def _two_sided(ids: Tensor, g: Tensor, sides: TwoSided, num_embeddings: int, padding: int) -> Tensor:
    for name, side, size in (("left", sides.left, num_embeddings), ("right", sides.right, g.shape[2])):
        if side.dim() != 2 or side.shape[1] != size:
            raise ValueError(f"{name} must have shape (k, {size}), got {tuple(side.shape)}")
    dtype = accumulation_dtype(g)
    left = sides.left.detach().to(dtype).T[torch.where(ids == padding, 0, ids.long())]
    left = torch.where((ids == padding)[:, :, None], 0, left)
    right = g.to(dtype) @ sides.right.detach().to(dtype).T
    return (left.mT @ right).flatten(1)

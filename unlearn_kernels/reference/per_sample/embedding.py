"""Per-sample gradients of an embedding in plain formulas."""

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype


def embedding_grads(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    """Row v of sample i is the sum of g[i, t] over the tokens with ids[i, t] = v: (B, V, d)."""
    kept = ids != padding_idx
    if not ((ids >= 0) & (ids < num_embeddings) | ~kept).all():
        raise ValueError(f"ids must be in [0, {num_embeddings})")
    out = g.new_zeros(g.shape[0] * num_embeddings, g.shape[2], dtype=accumulation_dtype(g))
    rows = ids.long() + num_embeddings * torch.arange(g.shape[0], device=ids.device)[:, None]
    out.index_add_(0, rows[kept], g[kept].to(out.dtype))
    return out.reshape(g.shape[0], num_embeddings, g.shape[2])


def embedding_sqnorms(ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int) -> Tensor:
    """`||W_i||_F^2`, (B,)."""
    return embedding_grads(ids, g, num_embeddings, padding_idx).square().sum(dim=(1, 2))


def embedding_dots(
    ids1: Tensor, g1: Tensor, ids2: Tensor, g2: Tensor, num_embeddings: int, padding_idx: int, summed: bool
) -> Tensor:
    """`<W_i, W'_j>`, (B1, B2), or `<W_i, sum_j W'_j>`, (B1,)."""
    dtype = accumulation_dtype(g1, g2)
    one, two = (
        embedding_grads(i, g, num_embeddings, padding_idx).to(dtype).flatten(1)
        for i, g in ((ids1, g1), (ids2, g2))
    )
    return one @ two.sum(0) if summed else one @ two.T


def embedding_weighted_sum(
    ids: Tensor, g: Tensor, w: Tensor, num_embeddings: int, padding_idx: int, wide: bool
) -> Tensor:
    """`sum_i w_i W_i`, (V, d)."""
    rows = embedding_grads(ids, g, num_embeddings, padding_idx)
    return torch.einsum("b,bvd->vd", w.to(rows.dtype), rows).to(rows.dtype if wide else g.dtype)

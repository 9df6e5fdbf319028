"""Per-sample gradients of a language-model head in plain formulas, with the gradient of the logits in memory."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from unlearn_kernels.reference.per_sample.embedding import embedding_grads
from unlearn_kernels.reference.token_loss import logits


def logit_gradients(
    h: Tensor,
    labels: Tensor,
    upstream: Tensor | None,
    lse: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """The hidden states and `Q = u (softmax(h W^T + b) - onehot)`, (B, T, V), both 0 where the label is ignored."""
    kept = labels != ignore_index
    # Ignored rows are left out before the product: whatever they hold, they count for nothing.
    rows = h.masked_fill(~kept.unsqueeze(-1), 0)
    z = logits(rows, weight, bias)
    lse = z.logsumexp(-1) if lse is None else lse.to(z.dtype)
    hits = one_hot(labels.masked_fill(~kept, 0), weight.shape[0]) if labels.numel() else torch.zeros_like(z)
    q = (z - lse.unsqueeze(-1)).exp() - hits
    if upstream is not None:
        q = q * upstream.unsqueeze(-1).to(q.dtype)
    return rows, q.masked_fill(~kept.unsqueeze(-1), 0)


def flat_grads(rows: Tensor, q: Tensor, bias: bool) -> Tensor:
    """`Q_i^T H_i` row after row and, with the bias, `sum_t q_t` after it, (B, V d (+ V))."""
    weight = (q.mT @ rows.to(q.dtype)).flatten(1)
    return torch.cat([weight, q.sum(dim=1)], dim=1) if bias else weight


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
    """`|Q_i^T [H_i, 1]|^2`, (B,); every method has the same value."""
    rows, q = logit_gradients(h, labels, upstream, lse, weight, bias, ignore_index)
    return flat_grads(rows, q, bias is not None).square().sum(dim=1)


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
    """`<Q_i^T H_i, Q'_j^T H'_j>`, (B1, B2), or (B1,) with the sum over j."""
    sides = (h1, labels1, upstream1, lse1), (h2, labels2, upstream2, lse2)
    left, right = (
        flat_grads(*logit_gradients(*side, weight, bias, ignore_index), bias is not None) for side in sides
    )
    return left @ right.sum(0) if summed else left @ right.T


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
    """`<E_i, Q_i^T H_i>`, (B,), E the gradient of the embedding that shares the head's weight."""
    rows, q = logit_gradients(h, labels, upstream, lse, weight, bias, ignore_index)
    embedding = embedding_grads(ids, g, weight.shape[0], padding_idx)
    return (flat_grads(rows, q, False) * embedding.flatten(1)).sum(dim=1)

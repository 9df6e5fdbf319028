"""Gradients of a language-model head that are wanted as tensors: weighted sums, all of them, projections."""

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample._checks import check_weights
from unlearn_kernels.per_sample._lm_head_ops import Tokens, checked, detached, logsumexps, plain_nll
from unlearn_kernels.per_sample._types import Gradients, TwoSided
from unlearn_kernels.reference import token_loss as reference
from unlearn_kernels.token_loss._autograd import BACKWARD

# Elements of Q that a two-sided projection holds at once.
_BLOCK: Final = 1 << 21


class _Head:
    """One call's tokens with nothing left out, the head, and the operators that run on them."""

    def __init__(
        self, x: Tokens, W: Tensor, bias: Tensor | None, ignore_index: int, backend: Backend | None
    ) -> None:
        tensors = (x.h, W) if bias is None else (x.h, W, bias)
        plain = plain_nll(backend, tensors)
        self._backward: Any = reference.linear_nll_backward if plain else BACKWARD
        self.W, self.bias, self.ignore_index = W.detach(), detached(bias), ignore_index
        self.h, self.labels = x.h, x.labels
        self.lse = logsumexps(x, W, bias, ignore_index, backend)
        self.upstream = torch.ones_like(self.lse) if x.upstream is None else x.upstream

    def gradients(self, upstream: Tensor, samples: slice) -> Gradients:
        """Those of `sum(upstream nll)` over some samples, in the dtype of the head."""
        h, labels, lse = (x[samples] for x in (self.h, self.labels, self.lse))
        options = lse.new_empty(0), self.ignore_index, 1.0, 0.0, False, True
        _, weight, bias = self._backward(upstream, h, self.W, self.bias, labels, lse, *options)
        return Gradients(weight, None if self.bias is None else bias)

    def each(self) -> Iterator[Gradients]:
        """The gradients of one sample after the other."""
        for i in range(len(self.h)):
            yield self.gradients(self.upstream[i : i + 1], slice(i, i + 1))


def weighted_sum(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    w: Tensor,
    *,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Gradients:
    r"""The weighted sum of per-sample gradients, `\sum_i w_i W_i`: `linear_nll`'s backward for `w_i u_t`.

    Args:
        h: hidden states, (B, ..., d).
        W: the head, (V, d).
        labels: (B, ...).
        w: one weight a sample, (B,).
        upstream: as in `sqnorms`.
        lse: as in `sqnorms`.
        bias: of the head, (V,); its gradient is then wanted as well.
        ignore_index: the label of rows that do not count.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        The weight's gradient (V, d) and the bias's (V,) or None, in their dtypes.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll`'s backward, 4 B T d V FLOPs.

    Source: book-keeping, Bu et al. 2023 (arXiv 2210.00038).
    """
    x = checked(Tokens(h, labels, upstream, lse), W, bias, ignore_index)
    check_weights(w, x.h, len(x.h))
    head = _Head(x, W, bias, ignore_index, backend)
    # A weight of 0 leaves its sample out even where an upstream gradient is infinite.
    weights = w.detach().to(head.lse.dtype)[:, None]
    return head.gradients(torch.where(weights == 0, 0.0, head.upstream * weights), slice(None))


def grads(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Gradients:
    """The per-sample gradients themselves, one backward of `linear_nll` after the other.

    Args:
        h: hidden states, (B, ..., d).
        W: the head, (V, d).
        labels: (B, ...).
        upstream: as in `sqnorms`.
        lse: as in `sqnorms`.
        bias: of the head, (V,); its gradients are then wanted as well.
        ignore_index: the label of rows that do not count.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, V, d) and (B, V) or None, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: one gradient, a copy of a head of half type, and that of `linear_nll`'s backward.
    """
    x = checked(Tokens(h, labels, upstream, lse), W, bias, ignore_index)
    head = _Head(x, *_wide(W, bias, x), ignore_index, backend)
    weight = head.lse.new_empty(len(x.h), *W.shape)
    offset = head.lse.new_empty(len(x.h), W.shape[0])
    for i, gradients in enumerate(head.each()):
        weight[i] = gradients.weight
        if gradients.bias is not None:
            offset[i] = gradients.bias
    return Gradients(weight, None if bias is None else offset)


def project(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    projection: Projection | TwoSided,
    *,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    r"""Projections of per-sample gradients.

    A `TwoSided` projection gives `L W_i R^T = (Q_i L^T)^T (H_i R^T)` row after row, then `L b_i`, from a block of
    the vocabulary at a time in three matrix products: no gradient is formed. Any other takes the gradients one by
    one, flattened row after row, then the bias's.

    Args:
        h: hidden states, (B, ..., d).
        W: the head, (V, d).
        labels: (B, ...).
        projection: `TwoSided(left (k_o, V), right (k_i, d))`, or a `Projection` of V d coordinates (V more with a
            bias).
        upstream: as in `sqnorms`.
        lse: as in `sqnorms`.
        bias: of the head, (V,).
        ignore_index: the label of rows that do not count.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, k_o k_i), k_o more with a bias, or (B, k); float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: `TwoSided`: 8 MB of Q, B T (d + k_o + k_i); otherwise one gradient and that of `linear_nll`'s backward.

    Source: Choe et al. 2024 (LoGra, arXiv 2405.13954).
    """
    x = checked(Tokens(h, labels, upstream, lse), W, bias, ignore_index)
    if isinstance(projection, TwoSided):
        return _two_sided(_Head(x, W, bias, ignore_index, backend), projection)
    dim = W.numel() + (0 if bias is None else W.shape[0])
    if projection.dim != dim:
        raise ValueError(f"projection must have {dim} coordinates to fit the head, got {projection.dim}")
    head = _Head(x, *_wide(W, bias, x), ignore_index, backend)
    out = head.lse.new_empty(len(x.h), projection.k)
    for i, gradients in enumerate(head.each()):
        flat = torch.cat([g.flatten() for g in gradients if g is not None])
        out[i] = projection.project(flat[None], backend=backend)[0]
    return out


def _two_sided(head: _Head, projection: TwoSided) -> Tensor:
    left, right = projection
    h, labels, lse, (vocabulary, d) = head.h, head.labels, head.lse, head.W.shape
    for name, side, size in (("left", left, vocabulary), ("right", right, d)):
        if side.dim() != 2 or side.shape[1] != size:
            raise ValueError(f"{name} of the projection must have shape (k, {size}), got {tuple(side.shape)}")
    wide, kept = lse.dtype, (labels != head.ignore_index).unsqueeze(-1)
    h = h.to(wide).masked_fill(~kept, 0)
    projected = lse.new_zeros(*labels.shape, left.shape[0])
    step = max(128, _BLOCK // max(labels.numel(), 1))
    for begin in range(0, vocabulary, step):
        rows = slice(begin, begin + step)
        q = h @ head.W[rows].to(wide).T
        if head.bias is not None:
            q += head.bias[rows].to(wide)
        q.sub_(lse.unsqueeze(-1)).exp_()
        columns = torch.arange(begin, begin + q.shape[-1], device=h.device)
        q -= (labels.unsqueeze(-1) == columns).to(wide)
        projected += q.mul_(head.upstream.unsqueeze(-1)).masked_fill_(~kept, 0) @ left[:, rows].to(wide).T
    weight = (projected.mT @ (h @ right.to(wide).T)).flatten(1)
    return weight if head.bias is None else torch.cat([weight, projected.sum(dim=1)], dim=1)


def _wide(W: Tensor, bias: Tensor | None, x: Tokens) -> tuple[Tensor, Tensor | None]:
    """The head in the type that gradients are accumulated in, which is then the type that they come in."""
    dtype = torch.float64 if x.h.dtype == torch.float64 else torch.float32
    return W.to(dtype), None if bias is None else bias.to(dtype)

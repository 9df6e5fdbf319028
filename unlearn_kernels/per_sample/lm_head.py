r"""Per-sample gradients of a language-model head, with no logits and no gradient of logits in memory.

Sample i's gradient of `\sum_t u_{it} n_{it}`, `n` the negative log-likelihoods of `token_loss.linear_nll`, is

.. math:: W_i = Q_i^T H_i, \qquad Q_i = u_i (\mathrm{softmax}(H_i W^T + b) - Y_i), \qquad b_i = \sum_t q_{it}

with `H_i` (T, d), `Q_i` (T, V) and `Y_i` the labels as unit vectors. Where `Q` is in memory anyway, the functions
of `per_sample.linear` take it for `G`.
"""

from typing import Final, Literal

from torch import Tensor

from unlearn_kernels._backends import Backend, select
from unlearn_kernels._checks import check_range
from unlearn_kernels.per_sample._checks import folded
from unlearn_kernels.per_sample._lm_head_gradients import grads, project, weighted_sum
from unlearn_kernels.per_sample._lm_head_ops import Tokens, check_float, checked, detached, flat, logsumexps

__all__ = ["Tokens", "dots", "grads", "project", "sqnorms", "tied_dots", "tied_sqnorms", "weighted_sum"]

Method = Literal["auto", "direct", "gram"]
DotsMethod = Literal["auto", "direct", "tokens"]
_CODES: Final = {"direct": 0, "gram": 1, "auto": 3}
_DOTS_CODES: Final = {"direct": 0, "tokens": 1, "auto": 3}


def _code(method: str, codes: dict[str, int]) -> int:
    if method not in codes:
        raise ValueError(f"method must be one of {', '.join(codes)}, got {method!r}")
    return codes[method]


def _floats(W: Tensor, bias: Tensor | None, *others: Tensor) -> tuple[Tensor, ...]:
    return (*others, W) if bias is None else (*others, W, bias)


def sqnorms(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    method: Method = "auto",
    backend: Backend | None = None,
) -> Tensor:
    r"""Squared norms of per-sample gradients of the head.

    .. math:: \|W_i\|^2 = \sum_{ts} (h_t \cdot h_s) (q_t \cdot q_s) \; \Big( + \Big\| \sum_t q_t \Big\|^2 \Big)

    Logits are computed again, 2 B T d V FLOPs, a block of the vocabulary at a time, and once more where `lse` is
    not given. Rows whose label is ignored are left out of every product.

    Args:
        h: hidden states, (B, ..., d), already shifted against `labels`; any strides; float32, float64, bfloat16
            or float16. What lies between the first dimension and the last is summed over (tokens, T in all).
        W: the head, (V, d); any strides.
        labels: (B, ...), integers in [0, V) or `ignore_index`.
        upstream: the gradient of the loss to each token's negative log-likelihood, (B, ...); ones if None.
        lse: log-sum-exps of the logits, (B, ...), as the forward left them; computed if None.
        bias: of the head, (V,); its gradient then counts as well.
        ignore_index: the label of rows that do not count.
        method: `direct` squares tiles of `W_i` (2 T d V FLOPs a sample), `gram` adds up `Q_i Q_i^T` over the
            vocabulary (T (T + 1) (d + V) FLOPs); `auto` takes the cheaper for each sample, by its rows that count,
            and goes to `direct` where the Gram sum cancels (see `docs/numerics.md`) or has more than 2048 rows.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,), float32 (float64 for float64 inputs), accumulated in that type. Not differentiable. The same bits at
        every number of threads.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `method` is unknown, or a label is neither in [0, V)
            nor ignored (on CUDA the sample's norm is NaN instead).

    Scratch on the CPU, in elements of the accumulation type, for the N rows of the samples in flight (as many as
    have 2048 rows together; at least one): N d, a block of 8 MB or N x 384, T^2 of each (`gram`); under 1 MB a
    thread; and B T / 96 V without `lse`.

    Source: the Gram form, Li et al. 2022 (arXiv 2110.05679); logits a block of the vocabulary at a time, Wijmans
    et al. 2024 (arXiv 2411.09009).
    """
    code = _code(method, _CODES)
    x = checked(Tokens(h, labels, upstream, lse), W, bias, ignore_index)
    call = select("lm_head_sqnorms", backend, _floats(W, bias, x.h))
    return call(*x, W.detach(), detached(bias), ignore_index, code)


def dots(
    left: Tokens,
    right: Tokens,
    W: Tensor,
    *,
    bias: Tensor | None = None,
    summed: bool = False,
    ignore_index: int = -100,
    method: DotsMethod = "auto",
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of per-sample gradients of the head.

    .. math:: \langle W_i, W'_j \rangle = \sum_{ts} (h_t \cdot h'_s) (q_t \cdot q'_s)

    Args:
        left: B1 samples, `Tokens(h, labels, upstream=None, lse=None)` or such a tuple.
        right: B2 samples; their number of tokens may differ.
        W: the head that both share, (V, d).
        bias: of the head, (V,); its gradients then count as well.
        summed: whether the sum of the right side's gradients is wanted instead of each.
        ignore_index: the label of rows that do not count.
        method: `tokens` multiplies all N1 rows that count on the left with all N2 on the right (2 N1 N2 (d + V)
            FLOPs), `direct` forms tiles of the gradients (2 (N1 + N2 + B1 B2) d V, the sum being one gradient);
            `auto` takes the cheaper. Logits come on top, as in `sqnorms`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B1, B2), or (B1,) if `summed`; float32 (float64 for float64 inputs). Not differentiable. The same bits at
        every number of threads.

    Raises:
        ValueError: as in `sqnorms`.

    Scratch on the CPU, in elements of the accumulation type: for at most 2048 rows of each side in flight (`direct`:
    at least one sample) N d, a block of 8 MB or N x 384, and N1 N2 (`tokens`) or 32 tiles a thread (`direct`).

    Source: Wang et al. 2025 (GhostSuite, arXiv 2406.11011) for the form of linear layers.
    """
    code = _code(method, _DOTS_CODES)
    x, y = (
        checked(Tokens(*side), W, bias, ignore_index, name)
        for side, name in ((left, " of left"), (right, " of right"))
    )
    call = select("lm_head_dots", backend, _floats(W, bias, x.h, y.h))
    return call(*x, *y, W.detach(), detached(bias), ignore_index, summed, code)


def tied_dots(
    ids: Tensor,
    G: Tensor,
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    padding_idx: int | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of an embedding's per-sample gradients with those of the head that shares its weight.

    .. math:: \langle E_i, W_i \rangle = \sum_{ts} q_{s, v_t} \, (g_t \cdot h_s), \qquad
        E_i = \sum_t e_{v_t} g_t^T

    which is half of what `|E_i + W_i|^2` has beyond `|E_i|^2 + |W_i|^2`. It takes the logits of a sample's own
    tokens only, 4 S T d FLOPs a sample.

    Args:
        ids: tokens v that were looked up, (B, ...), S a sample.
        G: gradients at the embedding's output, (B, ..., d).
        h: hidden states, as in `sqnorms`.
        W: the weight of both, (V, d).
        labels: as in `sqnorms`.
        upstream: as in `sqnorms`.
        lse: as in `sqnorms`; without it all logits are computed once.
        bias: of the head, (V,); it shifts the logits, and takes no other part.
        padding_idx: the token whose embedding gets no gradient.
        ignore_index: the label of rows that do not count.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,), float32 (float64 for float64 inputs). Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or a label or an id is out of range (on CUDA the
            sample's result is NaN instead).

    Scratch on the CPU: under 0.5 MB a thread and 32 bytes a token.
    """
    x = checked(Tokens(h, labels, upstream, lse), W, bias, ignore_index)
    ids, g, padding = _looked_up(ids, G, x, W, padding_idx)
    call = select("lm_head_tied_dots", backend, _floats(W, bias, x.h, g))
    return call(ids, g, *x, W.detach(), detached(bias), padding, ignore_index)


def tied_sqnorms(
    ids: Tensor,
    G: Tensor,
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    upstream: Tensor | None = None,
    lse: Tensor | None = None,
    bias: Tensor | None = None,
    padding_idx: int | None = None,
    ignore_index: int = -100,
    method: Method = "auto",
    backend: Backend | None = None,
) -> Tensor:
    r"""Squared norms of per-sample gradients of a weight that an embedding and the head share.

    .. math:: \|E_i + W_i\|^2 = \|E_i\|^2 + \|W_i\|^2 + 2 \langle E_i, W_i \rangle

    from `embedding.sqnorms`, `sqnorms` and `tied_dots`.

    Args:
        ids: as in `tied_dots`.
        G: as in `tied_dots`.
        h: as in `sqnorms`.
        W: the weight of both, (V, d).
        labels: as in `sqnorms`.
        upstream: as in `sqnorms`.
        lse: as in `sqnorms`.
        bias: of the head, (V,); its gradient then counts as well.
        padding_idx: the token whose embedding gets no gradient.
        ignore_index: the label of rows that do not count.
        method: as in `sqnorms`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,), float32 (float64 for float64 inputs), at least 0. Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `method` is unknown, or a label or an id is out of
            range (on CUDA the sample's result is NaN instead).

    Scratch: that of the three.
    """
    code = _code(method, _CODES)
    x = checked(Tokens(h, labels, upstream, lse), W, bias, ignore_index)
    ids, g, padding = _looked_up(ids, G, x, W, padding_idx)
    x = x._replace(lse=logsumexps(x, W, bias, ignore_index, backend))
    head, floats = (W.detach(), detached(bias)), _floats(W, bias, x.h, g)
    embedding = select("embedding_sqnorms", backend, floats)(ids, g, W.shape[0], padding)
    norms = select("lm_head_sqnorms", backend, floats)(*x, *head, ignore_index, code)
    dots = select("lm_head_tied_dots", backend, floats)(ids, g, *x, *head, padding, ignore_index)
    return (embedding.to(norms.dtype) + norms + 2 * dots).clamp_min(0)  # where E = -W rounding may fall below


def _looked_up(
    ids: Tensor, G: Tensor, x: Tokens, W: Tensor, padding_idx: int | None
) -> tuple[Tensor, Tensor, int]:
    """What an embedding's kernels take: ids (B, S), G (B, S, d), and -1 for no padding."""
    check_float("G", G, W)
    if ids.is_floating_point() or G.shape != (*ids.shape, W.shape[1]) or ids.shape[:1] != x.h.shape[:1]:
        got = f"{ids.dtype} {tuple(ids.shape)} and {tuple(G.shape)}"
        raise ValueError(
            f"ids must be integers (B, ...) and G (B, ..., {W.shape[1]}), B = {len(x.h)}, got {got}"
        )
    if ids.device != W.device:
        raise ValueError(f"ids must be on the device of W, {W.device}, got {ids.device}")
    if ids.is_cpu:
        check_range("ids", ids, W.shape[0])
    if padding_idx is not None and not -W.shape[0] <= padding_idx < W.shape[0]:
        raise ValueError(f"padding_idx must be in [{-W.shape[0]}, {W.shape[0]}) or None, got {padding_idx}")
    padding = -1 if padding_idx is None else padding_idx % W.shape[0]
    return flat(ids.long()), folded(G.detach()), padding

"""Distances between a head's distributions and others: a reference model's, or targets made from them."""

from typing import Any, Final, Literal

from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.reference.token_rows import PAIR, PAIR_FIELDS, SOFTPLUS, STAT_FIELDS, STATS, linear_rows
from unlearn_kernels.token_loss._public import Reference, arguments, register_rows, run
from unlearn_kernels.token_loss._rows import RowArguments, Terms, combination, combined, reduced
from unlearn_kernels.token_loss.linear import Reduction


def _kernels(*args: Any) -> Tensor:
    *row, terms, reduction = args
    return combination(RowArguments(*row), terms, reduction)


def _plain(*args: Any) -> Tensor:
    *row, terms, reduction = args
    x = RowArguments(*row)
    return reduced(combined(linear_rows(*x)[0], terms), x, reduction)


def _pair(**coefficients: float) -> Terms:
    return tuple((PAIR_FIELDS.index(name), c) for name, c in coefficients.items())


# The terms of each direction of `linear_kl`; -sum p log q is the reverse divergence and p's entropy.
_DIRECTIONS: Final = {
    "forward": _pair(kl=1.0),
    "reverse": _pair(reverse_kl=1.0),
    "cross": _pair(reverse_kl=1.0, mean=-1.0),
}


def _checked(reduction: Reduction) -> Reduction:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")
    return reduction


for _name, _formula in (
    ("linear_kl", "sum_v q_v (log q_v - log p_v), or the reverse"),
    ("linear_soft_ce", "-sum_v q'_v log p_v, q' without its label or with a lowered one"),
    ("linear_softplus", "sum_v log(1 + exp(beta (z_v - r_v)))"),
):
    register_rows(_name, _formula, _kernels, _plain)


def linear_kl(
    h: Tensor,
    W: Tensor,
    reference: Reference,
    labels: Tensor | None = None,
    *,
    direction: Literal["forward", "reverse", "cross"] = "forward",
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "none",
    backend: Backend | None = None,
) -> Tensor:
    r"""Kullback-Leibler divergence of a head from a reference, row by row, with no logits of either in memory.

    .. math:: \mathrm{KL}(q \| p) = \sum_v q_v (\log q_v - \log p_v), \qquad
        p = \mathrm{softmax}(z), \quad q = \mathrm{softmax}(r)

    forward (q the reference: what retain losses use), `KL(p || q)`, reverse, or the cross-entropy `-sum p log q` of
    the policy to the reference (no entropy: it gathers p on q's most likely word). Gradients to the logits:

    .. math:: p - q, \qquad p \odot (\log p - \log q - \mathrm{KL}(p \| q)), \qquad
        p \odot (\textstyle\sum_u p_u \log q_u - \log q)

    The reference is its hidden states and head, `(h, W)` or `(h, W, bias)`: d numbers a token to cache instead of
    V. Its head may be W itself, and its width another. It is a constant. Scale and soft-cap hold for both.

    With `reduction` "sum" or "mean" and a float32 or float64 head, or with a head that takes no gradient, gradients are
    made in the sweep of the forward (8 or 6 N d V FLOPs); otherwise backward makes both logits again (12).

    Args:
        h: hidden states, (*, d); any strides; float32, float64, bfloat16 or float16.
        W: the head, (V, d).
        reference: hidden states (*, d'), head (V, d') and bias (V,) of the reference.
        labels: which rows count, (*): those whose label is not `ignore_index`; all without.
        direction: "forward", "reverse" or "cross".
        bias: (V,).
        ignore_index: the label of rows that do not count; they get 0, and no gradient.
        scale: what multiplies the logits.
        softcap: Gemma-2's soft-cap, above 0.
        reduction: "none"; "sum"; or "mean", over the rows that count (NaN if there are none).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (*), or a scalar if reduced; float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or `direction` or `reduction` is unknown.
        RuntimeError: if a gradient is differentiated again.

    Scratch for N rows, in elements of the accumulation type: `N (d + d') + N V / 24` forward; backward besides
    `2 N d`, a block of logits, 8 MB or N x 384, and `256 d` of `W`; in one sweep of R rows at a time
    `R (3 d + d' + 2 V)` and `256 d` of `W`, R the largest of N / 6 (at most 256), 128 (at most N / 4), 32, and what
    8 MB hold.

    Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121), Zhang et al. 2024 (NPO, arXiv 2404.05868).
    """
    if direction not in _DIRECTIONS:
        raise ValueError(f"direction must be forward, reverse or cross, got {direction!r}")
    args = arguments(PAIR, h, W, bias, reference, labels, ignore_index, scale, softcap)
    found: Tensor = run("linear_kl", backend, args, _DIRECTIONS[direction], _checked(reduction))
    return found


def linear_soft_ce(
    h: Tensor,
    W: Tensor,
    labels: Tensor | None,
    reference: Reference | None = None,
    *,
    beta: float = 0.0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "none",
    backend: Backend | None = None,
) -> Tensor:
    r"""Cross-entropy of a head to a soft target that is made from its label, without the target in memory.

    .. math:: -\sum_v q'_v \log p_v, \qquad \partial / \partial z = p - q'

    With a reference, `q' = softmax(r - beta e_y)`, its distribution with the label's logit lowered by beta (UNDIAL);
    q' differs from softmax(r) by a factor everywhere but at y. Without, `q'` is p without the label, renormalised and
    held constant (CEU), whose gradient is `-p_y / (1 - p_y)` times that of the likelihood loss.

    Args:
        h: hidden states, (*, d); any strides; float32, float64, bfloat16 or float16.
        W: the head, (V, d).
        labels: (*), integers in [0, V) or `ignore_index`; None for every row, with a reference and beta 0.
        reference: hidden states (*, d'), head (V, d') and bias (V,) of the reference, a constant.
        beta: how much the label's logit is lowered; only with a reference.
        bias: (V,).
        ignore_index: the label of rows that do not count; they get 0, and no gradient.
        scale: what multiplies the logits.
        softcap: Gemma-2's soft-cap, above 0.
        reduction: "none"; "sum"; or "mean", over the rows that count (NaN if there are none).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (*), or a scalar if reduced; float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `reduction` is unknown, `beta` comes without a reference,
            or one word alone does, or a label is out of range.
        RuntimeError: if a gradient is differentiated again.

    Scratch and FLOPs: those of `linear_kl`; without a reference, of `linear_stats` and `linear_nll`.

    Sources: Dong et al. 2024 (UNDIAL, arXiv 2402.10052); Yang 2025 (CE-U, arXiv 2503.01224).
    """
    if reference is None and beta != 0:
        raise ValueError(f"beta needs a reference, got beta {beta} and none")
    if labels is None and (reference is None or beta != 0):
        raise ValueError("labels are needed unless there is a reference and beta is 0, got None")
    if reference is None and W.shape[0] == 1:
        raise ValueError("W must have words besides the label without a reference, got 1")
    kind = STATS if reference is None else PAIR
    args = arguments(kind, h, W, bias, reference, labels, ignore_index, scale, softcap, beta)
    terms = ((STAT_FIELDS.index("ceu"), 1.0),) if reference is None else _pair(soft=1.0)
    found: Tensor = run("linear_soft_ce", backend, args, terms, _checked(reduction))
    return found


def linear_softplus(
    h: Tensor,
    W: Tensor,
    reference: Reference | None = None,
    labels: Tensor | None = None,
    *,
    beta: float = 1.0,
    offset: float = 0.0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "none",
    backend: Backend | None = None,
) -> Tensor:
    r"""`-log sigmoid` of logits below a reference's, summed over the vocabulary: NPO on raw logits, as MUSE has it.

    .. math:: \sum_v -\log \sigma(\beta (r_v - z_v)), \qquad
        \partial / \partial z_v = \beta \, \sigma(\beta (z_v - r_v))

    Args:
        h: hidden states, (*, d); any strides; float32, float64, bfloat16 or float16.
        W: the head, (V, d).
        reference: hidden states (*, d'), head (V, d') and bias (V,) of the reference, a constant.
        labels: which rows count, (*): those whose label is not `ignore_index`; all without.
        beta: inverse temperature.
        offset: what stands for every `r_v` without a reference.
        bias: (V,).
        ignore_index: the label of rows that do not count; they get 0, and no gradient.
        scale: what multiplies the logits.
        softcap: Gemma-2's soft-cap, above 0.
        reduction: "none"; "sum"; or "mean", over the rows that count (NaN if there are none).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (*), or a scalar if reduced; float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or `reduction` is unknown.
        RuntimeError: if a gradient is differentiated again.

    Scratch and FLOPs: those of `linear_kl`.

    Source: muse_bench (Shi et al. 2024, arXiv 2407.06460), `baselines/iterative.py`; not the NPO of its paper.
    """
    args = arguments(SOFTPLUS, h, W, bias, reference, labels, ignore_index, scale, softcap, beta, offset)
    found: Tensor = run("linear_softplus", backend, args, ((0, 1.0),), _checked(reduction))
    return found

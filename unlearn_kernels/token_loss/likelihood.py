"""Losses that raise or lower likelihoods of tokens, with or without weights: ascent, difference, WGA, SatImp."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from unlearn_kernels.token_loss._options import (
    NllOptions,
    by_sequence,
    check_batched,
    check_dialect,
    check_tokens,
    counting,
    total_over,
)
from unlearn_kernels.token_loss.linear import linear_nll

# Hidden states (*, d) and labels (*).
Pair = tuple[Tensor, Tensor]


def grad_ascent(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    dialect: Literal["open_unlearning", "llm_unlearn"] = "open_unlearning",
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Gradient ascent on the likelihood loss.

    .. math:: -\frac{1}{N} \sum_t n_t, \qquad \text{or} \qquad
        -\frac{1}{B} \sum_s \frac{1}{|y_s|} \sum_t n_{st} \quad \text{(llm\_unlearn)}

    Args:
        h: hidden states, (*, d), already shifted against `labels`; (B, ..., d) for llm_unlearn.
        W: the head, (V, d).
        labels: (*).
        dialect: "open_unlearning", the mean over tokens that count; "llm_unlearn", the mean of each sequence's mean.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if a mean runs over nothing, as in the sources.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or the dialect is unknown.

    Scratch: that of `linear_nll`.

    Sources: Jang et al. 2023 (arXiv 2210.01504); Yao et al. 2023 (llm_unlearn, arXiv 2310.10683), `get_answer_loss`.
    """
    check_dialect(dialect, ("open_unlearning", "llm_unlearn"))
    if dialect == "open_unlearning":
        return -linear_nll(h, W, labels, reduction="mean", **options)
    check_batched(labels)
    counts = by_sequence(counting(labels, options).to(torch.int64))
    return -(by_sequence(linear_nll(h, W, labels, **options)) / counts).mean()


def grad_diff(
    forget: Pair,
    retain: Pair,
    W: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Gradient difference: ascent on what is to be forgotten, descent on what is to be kept.

    .. math:: -\frac{\gamma}{N_f} \sum_t n_t^{f} + \frac{\alpha}{N_r} \sum_t n_t^{r}

    Means run over the tokens that count; the mean over none is NaN, as in PyTorch.

    Args:
        forget: hidden states (*, d) and labels (*).
        retain: the same of the retain batch; its shape may differ.
        W: the head, (V, d).
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll` on one batch at a time.

    Sources: Liu et al. 2022 (arXiv 2203.12817); Maini et al. 2024 (TOFU, arXiv 2401.06121); the reduction is
    that of open-unlearning.
    """
    parts = (linear_nll(h, W, y, reduction="mean", **options) for h, y in (forget, retain))
    return -gamma * next(parts) + alpha * next(parts)


def wga(h: Tensor, W: Tensor, labels: Tensor, *, beta: float = 1.0, **options: Unpack[NllOptions]) -> Tensor:
    r"""Weighted gradient ascent: tokens that are forgotten already count less.

    .. math:: -\frac{1}{N} \sum_t \mathrm{sg}[p_t^\beta] \, n_t, \qquad p_t = e^{-n_t}

    Args:
        h: hidden states, (*, d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (*).
        beta: exponent of the weight, which is a constant in backward.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if no token counts, as in the source.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll`.

    Source: Wang et al. 2025 (G-effect, arXiv 2502.19301), as in open-unlearning's `compute_wga_loss`.
    """
    nll = linear_nll(h, W, labels, **options)
    return _weighted_ascent(nll, (-beta * nll).exp(), labels, options)


def satimp(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Ascent weighted by saturation and importance.

    .. math:: -\frac{1}{N} \sum_t \mathrm{sg}[p_t^{\beta_1} (1 - p_t)^{\beta_2}] \, n_t, \qquad p_t = e^{-n_t}

    Args:
        h: hidden states, (*, d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (*).
        beta1: exponent of the probability.
        beta2: exponent of its complement, which is formed without cancelling.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if no token counts, as in the source.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll`.

    Source: Yang et al. 2025 (SatImp, arXiv 2505.11953), as in open-unlearning's `compute_satimp_loss`.
    """
    nll = linear_nll(h, W, labels, **options)
    return _weighted_ascent(nll, (-beta1 * nll).exp() * (-torch.expm1(-nll)) ** beta2, labels, options)


def tnpo(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    reference_nll: Tensor,
    *,
    beta: float = 0.1,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""NPO token by token: ascent weighted by how far each token is from the reference.

    .. math:: -\frac{1}{N} \sum_t \mathrm{sg}\Big[\frac{2 p_t^\beta}{p_t^\beta + q_t^\beta + 10^{-5}}\Big] n_t

    Args:
        h: hidden states, (*, d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (*).
        reference_nll: -log q, the tokens' negative log-likelihoods under the reference, (*).
        beta: inverse temperature.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if no token counts, as in the source.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll`.

    Source: Wang et al. 2025 (arXiv 2502.19301), G-effect's `ins_npo`.
    """
    return wtnpo(h, W, labels, reference_nll, beta=beta, alpha=0.0, **options)


def wtnpo(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    reference_nll: Tensor,
    *,
    beta: float = 0.1,
    alpha: float | None = None,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Token-level NPO, weighted by the tokens' own likelihood as WGA is.

    .. math:: -\frac{1}{N} \sum_t
        \mathrm{sg}\Big[\frac{2 p_t^{\beta + \alpha}}{p_t^\beta + q_t^\beta + 10^{-5}}\Big] n_t

    Args:
        h: hidden states, (*, d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (*).
        reference_nll: -log q, the tokens' negative log-likelihoods under the reference, (*).
        beta: inverse temperature.
        alpha: exponent of the further weight; beta by default, because G-effect's `w_ins_npo` overwrites its beta with
            the one hyper-parameter that it reads.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if no token counts, as in the source.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll`.

    Source: Wang et al. 2025 (arXiv 2502.19301), G-effect's `w_ins_npo`.
    """
    check_tokens("reference_nll", reference_nll, labels)
    nll = linear_nll(h, W, labels, **options)
    extra = beta if alpha is None else alpha
    n, r = nll.detach(), reference_nll.detach().to(nll.dtype)
    p, q = (-beta * n).exp(), (-beta * r).exp()
    return _weighted_ascent(nll, 2 * p * (-extra * n).exp() / (p + q + 1e-5), labels, options)


def _weighted_ascent(nll: Tensor, weight: Tensor, labels: Tensor, options: NllOptions) -> Tensor:
    return -total_over(weight.detach() * nll, counting(labels, options).sum())


def idk(refusal: Pair, retain: Pair, W: Tensor, **options: Unpack[NllOptions]) -> Tensor:
    r"""Likelihood of "I don't know" for what is to be forgotten, together with that of the retain batch.

    .. math:: \frac{1}{N_i + N_r} \Big( \sum_t n_t^{i} + \sum_t n_t^{r} \Big)

    one mean over the tokens of both, as for their concatenation.

    Args:
        refusal: hidden states (*, d) and labels (*) of the forget questions with refusals.
        retain: the same of the retain batch; its shape may differ.
        W: the head, (V, d).
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll` on one batch at a time.

    Source: Maini et al. 2024 (TOFU, arXiv 2401.06121), `idk` of its trainer.
    """
    pairs = (refusal, retain)
    sums = [linear_nll(h, W, y, reduction="sum", **options) for h, y in pairs]
    counts = [counting(y, options).sum() for _, y in pairs]
    return (sums[0] + sums[1]) / (counts[0] + counts[1])

"""Losses that compare sequences' likelihoods with a reference's, or with a bound: NPO, SimNPO, DPO."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import Unpack

from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.token_loss._options import (
    NllOptions,
    by_sequence,
    check_batched,
    check_dialect,
    check_positive,
    check_sequences,
    counting,
)
from unlearn_kernels.token_loss._public import Reference
from unlearn_kernels.token_loss.distances import linear_softplus
from unlearn_kernels.token_loss.likelihood import Pair
from unlearn_kernels.token_loss.linear import linear_nll, swept_preference


def npo(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    reference_nll: Tensor | None = None,
    *,
    beta: float = 0.1,
    dialect: Literal["open_unlearning", "soul", "erasus", "muse"] = "open_unlearning",
    reference: Reference | None = None,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Negative preference optimisation of a batch of sequences to be forgotten.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_s \log \sigma\big(\beta (n_s - r_s)\big),
        \qquad n_s = \sum_t n_{st}

    A sequence without labels that count has n_s = 0 and still counts in the mean, as in the sources.

    | dialect | what differs |
    |---|---|
    | open_unlearning | nothing: the paper's, TOFU's, FLAT's and GRU's |
    | soul | one term: n and r are means over the tokens of the batch; Unlearn-Simple's WMDP too |
    | erasus | no `2 / beta` |
    | muse | raw logits, `(2 / (beta B T V)) sum_v softplus(beta (z - r))` over every row; labels are not read |

    Args:
        h: hidden states, (B, ..., d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (B, ...).
        reference_nll: r, the sequences' sums under the reference model, (B,); not for muse.
        beta: inverse temperature, above 0.
        dialect: see above. MUSE's has no likelihood in it, and is not the paper's loss.
        reference: hidden states and head of the reference model, for muse alone.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, beta is not positive, the dialect is unknown or lacks its
            reference.

    Scratch: that of `linear_nll`; muse: of `linear_softplus`. Where one of two or more sequences has at most 1 GiB of
    logits, or `memory_budget`, and the head takes a gradient in float32 or float64, whole sequences are held, as many
    as there are rows in one of its sweeps, and FLOPs are those of the sweep: 6 N d V.

    Source: Zhang et al. 2024 (arXiv 2404.05868), equation 3, as in its code and in open-unlearning; SOUL's and
    muse_bench's `NPO.py` and `iterative.py`.
    """
    check_positive("beta", beta)
    check_dialect(dialect, ("open_unlearning", "soul", "erasus", "muse"))
    if dialect == "muse":
        if reference is None:
            raise ValueError("reference must be the reference's hidden states and head for muse, got None")
        return _on_logits(h, W, beta, 0.0, reference, options)
    if reference_nll is None:
        raise ValueError(f"reference_nll must be given for {dialect}, got None")
    check_sequences("reference_nll", reference_nll, labels)
    if dialect != "soul":
        found = swept_preference(h, W, labels, torch.ones_like(labels), reference_nll, beta, **options)
        if found is not None:
            return found if dialect == "open_unlearning" else beta / 2 * found
    nll = linear_nll(h, W, labels, **options)
    n, r = by_sequence(nll), reference_nll.to(nll.dtype)
    if dialect == "soul":
        count = counting(labels, options).sum()
        n, r = n.sum() / count, r.sum() / count
    return -(1 if dialect == "erasus" else 2 / beta) * functional.logsigmoid(beta * (n - r)).mean()


def simnpo(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    beta: float = 4.5,
    delta: float = 0.0,
    dialect: Literal["open_unlearning", "wmdp", "muse"] = "open_unlearning",
    lengths: Tensor | None = None,
    fixed: bool = False,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""NPO without a reference: each sequence's mean likelihood against a bound.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_s \log \sigma\big(\beta (n_s / |y_s| - \delta)\big)

    | dialect | what differs |
    |---|---|
    | open_unlearning | nothing; also Unlearn-Simple's TOFU. `lengths` reproduces its count, and 0 / 0 is NaN |
    | wmdp | one term: the mean over the tokens of the batch instead of `n_s / |y_s|` |
    | muse | raw logits, `(2 / (beta B T V)) sum_v softplus(beta (z + delta))` over every row; labels are not read |

    Args:
        h: hidden states, (B, ..., d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (B, ...).
        beta: inverse temperature, above 0.
        delta: the bound; muse's gamma.
        dialect: see above.
        lengths: |y_s|, (B,), if not the number of labels here that count: open-unlearning counts them before the
            shift, which is one more where the first position has one.
        fixed: leave sequences without labels out of the mean, instead of NaN.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, beta is not positive, or the dialect is unknown.

    Scratch and FLOPs: those of `npo`.

    Source: Fan et al. 2024 (SimNPO, arXiv 2410.07163); open-unlearning; Unlearn-Simple's WMDP and MUSE folders.
    """
    check_positive("beta", beta)
    check_dialect(dialect, ("open_unlearning", "wmdp", "muse"))
    if dialect == "muse":
        return _on_logits(h, W, beta, -delta, None, options)
    counts = counting(labels, options)
    if dialect == "wmdp":
        nll = linear_nll(h, W, labels, **options)
        return -2 / beta * functional.logsigmoid(beta * (nll.sum() / counts.sum() - delta))
    check_batched(labels)
    size = by_sequence(counts.to(torch.int64))
    if lengths is not None:
        check_sequences("lengths", lengths, labels)
        size = lengths
    if not fixed:
        share = 1 / size.to(accumulation_dtype(h))
        shares = share.view(-1, *[1] * (labels.dim() - 1)).expand(labels.shape)
        found = swept_preference(h, W, labels, shares, torch.full_like(share, delta), beta, **options)
        if found is not None:
            return found
    n, present = by_sequence(linear_nll(h, W, labels, **options)), size != 0
    mean = n / torch.where(present, size, 1) if fixed else n / size
    terms = functional.logsigmoid(beta * (mean - delta))
    if fixed:
        return -2 / beta * torch.where(present, terms, 0.0).sum() / present.sum().clamp_min(1)
    return -2 / beta * terms.mean()


def _on_logits(
    h: Tensor, W: Tensor, beta: float, offset: float, reference: Reference | None, options: NllOptions
) -> Tensor:
    """`-(2 / beta) log sigmoid(beta (r - z))`, averaged over every logit of every row."""
    logits = {k: v for k, v in options.items() if k not in ("memory_budget", "ignore_index")}
    loss = linear_softplus(h, W, reference, beta=beta, offset=offset, reduction="mean", **logits)  # type: ignore[arg-type]
    return 2 / (beta * W.shape[0]) * loss


def dpo(
    win: Pair,
    lose: Pair,
    W: Tensor,
    reference_win: Tensor | None = None,
    reference_lose: Tensor | None = None,
    *,
    beta: float = 0.1,
    dialect: Literal["open_unlearning", "tofu", "flat"] = "open_unlearning",
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Direct preference optimisation of an answer, often a refusal, over the one to be forgotten.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_s \log \sigma\big(\beta
        ((r_s^{w} - n_s^{w}) + (n_s^{l} - r_s^{l}))\big)

    | dialect | what differs |
    |---|---|
    | open_unlearning | nothing |
    | tofu | no `2 / beta` |
    | flat | the references count as 0, and may be left out |

    Args:
        win: hidden states (B, ..., d), shifted, and labels (B, ...) of the answers to be preferred.
        lose: the same of the answers to be forgotten; lengths may differ.
        W: the head, (V, d).
        reference_win: the winners' sums of negative log-likelihoods under the reference, (B,).
        reference_lose: the losers'.
        beta: inverse temperature, above 0.
        dialect: see above.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, beta is not positive, or the dialect is unknown or lacks
            its references.

    Scratch: that of `linear_nll` on one batch at a time.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290); open-unlearning's `compute_dpo_loss`; TOFU; FLAT.
    """
    check_positive("beta", beta)
    check_dialect(dialect, ("open_unlearning", "tofu", "flat"))
    for _, labels in (win, lose):
        check_batched(labels)
    if win[1].shape[:1] != lose[1].shape[:1]:
        raise ValueError(f"win and lose must have as many sequences, got {len(win[1])} and {len(lose[1])}")
    margins = []
    for name, (h, labels), r in (("win", win, reference_win), ("lose", lose, reference_lose)):
        n = by_sequence(linear_nll(h, W, labels, **options))
        if dialect != "flat":
            if r is None:
                raise ValueError(f"reference_{name} must be given for {dialect}, got None")
            check_sequences(f"reference_{name}", r, labels)
            n = n - r.to(n.dtype)
        margins.append(n)
    terms = functional.logsigmoid(beta * (margins[1] - margins[0]))
    return -(1 if dialect == "tofu" else 2 / beta) * terms.mean()

"""Losses towards a distribution: KL retain terms, UNDIAL, CEU, and PDU's flat logits."""

from typing import Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from unlearn_kernels._backends import REGISTRY, select
from unlearn_kernels.reference.token_rows import PAIR, PAIR_FIELDS, linear_rows
from unlearn_kernels.token_loss._checks import NO_LABEL, check_labels
from unlearn_kernels.token_loss._options import (
    LogitOptions,
    check_batched,
    check_dialect,
    counting,
    total_over,
)
from unlearn_kernels.token_loss._public import Reference, arguments
from unlearn_kernels.token_loss._rows import LinearRows
from unlearn_kernels.token_loss.distances import linear_kl, linear_soft_ce
from unlearn_kernels.token_loss.statistics import linear_maxmean


def kl_retain(
    h: Tensor,
    W: Tensor,
    reference: Reference,
    labels: Tensor | None = None,
    *,
    dialect: Literal["open_unlearning", "llm_unlearn", "soul", "muse"] = "open_unlearning",
    **options: Unpack[LogitOptions],
) -> Tensor:
    r"""Keeps a model near its reference on a retain batch.

    .. math:: \frac{1}{N} \sum_t \mathrm{KL}(q_t \| p_t), \qquad q \text{ the reference}

    | dialect | what differs |
    |---|---|
    | open_unlearning | nothing; also TOFU's and FLAT's. Every row counts, prompts and padding with them |
    | llm_unlearn | `-sum q log p` in place of the divergence: the same gradient |
    | soul | `-sum p log q`, p the model's own: no entropy, so it gathers p on the reference's most likely word |
    | muse | `(1 / B) sum_tv e^r (r - z)` on raw logits: unbounded below, its gradient `-e^r / B` (muse_bench#5) |

    The 1e-12 that llm_unlearn and soul add to a probability before its logarithm is left out.

    Args:
        h: hidden states, (*, d); (B, ..., d) for muse.
        W: the head, (V, d).
        reference: hidden states (*, d'), head (V, d') and bias (V,) of the reference.
        labels: with them only rows that count do, the corrected form; by default every row, as in the sources.
        dialect: see above.
        options: see `LogitOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or the dialect is unknown.

    Scratch: that of `linear_kl`.

    Sources: Maini et al. 2024 (TOFU, arXiv 2401.06121); llm_unlearn's `compute_kl`; SOUL's `KL.py`; muse_bench.
    """
    check_dialect(dialect, ("open_unlearning", "llm_unlearn", "soul", "muse"))
    if dialect == "muse":
        return _raw_kl(h, W, reference, labels, options)
    if dialect == "llm_unlearn":
        return linear_soft_ce(h, W, labels, reference, reduction="mean", **options)
    direction: Literal["forward", "cross"] = "cross" if dialect == "soul" else "forward"
    return linear_kl(h, W, reference, labels, direction=direction, reduction="mean", **options)


def _raw_kl(
    h: Tensor, W: Tensor, reference: Reference, labels: Tensor | None, options: LogitOptions
) -> Tensor:
    """`sum_v e^r (r - z) = e^lse_r (KL + lse_r - lse)`, whose gradient to p cancels exactly."""
    args = arguments(
        PAIR, h, W, options.get("bias"), reference, labels, options.get("ignore_index", -100),
        options.get("scale", 1.0), options.get("softcap"),
    )  # fmt: skip
    tensors = tuple(x for x in args[:6] if isinstance(x, Tensor))
    chosen = select("linear_kl", options.get("backend"), tensors)
    plain = chosen is REGISTRY["linear_kl"].impls["reference"].call
    fields = (linear_rows if plain else LinearRows.apply)(*args)[0]
    row = dict(zip(PAIR_FIELDS, fields, strict=True))
    shift = row["ref_lse"].detach()
    kept = torch.ones_like(shift, dtype=torch.bool) if labels is None else counting(labels, options)
    terms = shift.exp() * (row["kl"] + shift - row["lse"])
    return torch.where(kept, terms, 0.0).sum() / h.shape[0]


def undial(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    reference: Reference,
    *,
    beta: float = 10.0,
    fixed: bool = False,
    **options: Unpack[LogitOptions],
) -> Tensor:
    r"""Self-distillation from a reference whose logit of the label is lowered.

    .. math:: -\frac{1}{N} \sum_{t, v} q'_{tv} \log p_{tv}, \qquad q'_t = \mathrm{softmax}(r_t - \beta e_{y_t})

    As published the mean runs over every row, prompts and padding with them, and a row whose label is `ignore_index`
    has the logit of word `V + ignore_index` lowered (a negative index counts from the end): V - 100.

    Args:
        h: hidden states, (*, d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (*).
        reference: hidden states (*, d'), head (V, d') and bias (V,) of the reference.
        beta: how much the label's logit is lowered.
        fixed: only rows whose label counts, instead of both quirks.
        options: see `LogitOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or `V + ignore_index` is no word and a row needs it.

    Scratch: that of `linear_kl`.

    Source: Dong et al. 2024 (UNDIAL, arXiv 2402.10052), as in open-unlearning's `compute_undial_loss`.
    """
    if not fixed:
        ignore_index = options.get("ignore_index", -100)
        kept, last = counting(labels, options), W.shape[0] + ignore_index
        if not 0 <= last < W.shape[0] and not kept.all():
            raise ValueError(
                f"ignore_index must be in [-{W.shape[0]}, 0), the word that rows without labels lower, or fixed=True "
                f"given, got {ignore_index}"
            )
        labels = torch.where(kept, check_labels(h, labels), last)
        options["ignore_index"] = NO_LABEL
    return linear_soft_ce(h, W, labels, reference, beta=beta, reduction="mean", **options)


def ceu(h: Tensor, W: Tensor, labels: Tensor, *, skip: int = 1, **options: Unpack[LogitOptions]) -> Tensor:
    r"""Cross-entropy to the model's own distribution without the label.

    .. math:: -\frac{1}{N} \sum_{t, v} q''_{tv} \log p_{tv}, \qquad
        q''_{tv} = \mathrm{sg}[p_{tv} / (1 - p_{t y_t})] \; (v \ne y_t), \quad q''_{t y_t} = 0

    Args:
        h: hidden states, (B, ..., d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (B, ...).
        skip: how many of a sequence's first labels do not count.
        options: see `LogitOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if no token counts, as in the source.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or `skip` is negative.

    Scratch: that of `linear_soft_ce`.

    Source: Yang 2025 (CE-U, arXiv 2503.01224), as in open-unlearning.
    """
    if skip < 0:
        raise ValueError(f"skip must not be negative, got {skip}")
    check_batched(labels)
    if skip:
        order = counting(labels, options).reshape(labels.shape[0], -1).cumsum(1).reshape(labels.shape)
        labels = check_labels(h, labels).masked_fill(order <= skip, options.get("ignore_index", -100))
    return linear_soft_ce(h, W, labels, reduction="mean", **options)


def pdu(h: Tensor, W: Tensor, labels: Tensor, **options: Unpack[LogitOptions]) -> Tensor:
    r"""The forget term of primal-dual unlearning: flat logits.

    .. math:: \frac{1}{N} \sum_t (\max_v z_{tv} - \bar z_t)^2

    open-unlearning does not shift: row t is judged with label t. Give `h` and `labels` of equal positions for its
    numbers, `h[:, :-1]` and `labels[:, 1:]` for rows that predict an answer.

    Args:
        h: hidden states, (*, d).
        W: the head, (V, d).
        labels: which rows count, (*).
        options: see `LogitOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs); NaN if no row counts, as in the source.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_maxmean`.

    Source: Entesari et al. 2025 (arXiv 2506.05314), as in open-unlearning's `pdu.py`.
    """
    found = linear_maxmean(h, W, labels, **options)
    return total_over((found.max - found.mean).square(), counting(labels, options).sum())

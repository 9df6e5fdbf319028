"""How much of a text a model still knows: probability, truth ratio, exact memorisation, extraction strength."""

from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from unlearn_kernels.token_loss._options import check_dialect
from unlearn_kernels.token_loss.audits.attacks import check_same, published
from unlearn_kernels.token_loss.audits.table import TokenTable

_EPS: Final = 1e-10


def probability(table: TokenTable, *, fixed: bool = False) -> Tensor:
    r"""The probability of each text, normalised by its length, `e^{-n_s / |y_s|}`, (N,) float64.

    Args:
        table: of the model.
        fixed: divide by the tokens that were summed, where the published code counts labels before the shift.

    Source: Maini et al. 2024 (TOFU, arXiv 2401.06121), open-unlearning's `evaluate_probability`.
    """
    return (-table.loss(fixed=fixed)).exp()


def truth_ratio(
    correct: TokenTable | Sequence[TokenTable],
    wrong: TokenTable | Sequence[TokenTable],
    *,
    dialect: Literal["tofu", "prob_mean"] = "tofu",
    fixed: bool = False,
) -> Tensor:
    r"""How likely wrong answers are against correct ones, (N,) float64.

    .. math:: \text{tofu: } \frac{w}{c + 10^{-10}}, \qquad \text{prob\_mean: } \frac{c}{c + w + 10^{-10}}

    with c and w the probabilities, normalised by length, of correct and wrong answers; of several answers the geometric
    mean.

    Args:
        correct: a table of paraphrased answers, or several of the same keys.
        wrong: the same of perturbed answers.
        dialect: "tofu", or open-unlearning's "prob_mean".
        fixed: as in `probability`.

    Raises:
        ValueError: if keys differ or the dialect is unknown.

    Source: Maini et al. 2024 (TOFU, arXiv 2401.06121), open-unlearning's `truth_ratio`.
    """
    check_dialect(dialect, ("tofu", "prob_mean"))
    tables = [[x] if isinstance(x, TokenTable) else list(x) for x in (correct, wrong)]
    for name, group in zip(("correct", "wrong"), tables, strict=True):
        if not group:
            raise ValueError(f"{name} must be at least one table, got none")
        for other in group:
            check_same(tables[0][0], other, name)
    c, w = ((-torch.stack([t.loss(fixed=fixed) for t in group]).mean(0)).exp() for group in tables)
    return w / (c + _EPS) if dialect == "tofu" else c / (c + w + _EPS)


def aggregate_truth_ratio(
    ratio: Tensor, how: Literal["closer_to_1_better", "true_better", "prob_mean"]
) -> float:
    """The mean over samples of `min(x, 1 / (x + 1e-10))` (forget set), `max(0, 1 - x)` (others) or x (prob_mean).

    Raises:
        ValueError: if `how` is unknown.
    """
    forms = {
        "closer_to_1_better": lambda x: torch.minimum(x, 1 / (x + _EPS)),
        "true_better": lambda x: (1 - x).clamp_min(0),
        "prob_mean": lambda x: x,
    }
    if how not in forms:
        raise ValueError(f"how must be one of {', '.join(forms)}, got {how!r}")
    return float(forms[how](ratio).mean())


def exact_memorization(table: TokenTable, *, fixed: bool = False) -> Tensor:
    """The share of tokens that are the model's likeliest, (N,) float64; NaN of none, where the source has None.

    As published without a sample's last token, the end of the text. A sample whose first position has a label is NaN:
    the source raises there.

    Args:
        table: of the model.
        fixed: every token.

    Source: Tirumala et al. 2022 (arXiv 2205.10770), open-unlearning's `exact_memorization`.
    """
    keep = torch.ones_like(table.hit) if fixed else published(table)
    return table.sums(table.hit & keep) / table.sums(keep)


def extraction_strength(table: TokenTable, *, fixed: bool = False) -> Tensor:
    r"""How little of a text the model needs to go on with the rest word for word, (N,) float64.

    .. math:: 1 - \frac{k}{n}, \qquad k = \min(\text{last miss} + 1, \; n - 1)

    As published without a sample's last token; a total miss scores 1 / n instead of 0, and no tokens score 0. A sample
    whose first position has a label scores 1 / n.

    Args:
        table: of the model.
        fixed: every token, and a total miss scores 0.

    Source: Carlini et al. 2021 (arXiv 2012.07805), open-unlearning's `extraction_strength`.
    """
    keep = torch.ones_like(table.hit) if fixed else published(table)
    first = torch.zeros(len(table), dtype=torch.bool) if fixed else table.counts > table.lengths
    n = torch.where(first, table.counts - 1, table.sums(keep).long())
    place = torch.arange(len(table.hit)) - table.starts[table.samples] + 1
    missed = torch.where(keep & ~table.hit, place, 0)
    k = torch.zeros(len(table), dtype=torch.int64).scatter_reduce_(0, table.samples, missed, "amax")
    k = torch.where(first, n - 1, k if fixed else torch.minimum(k, n - 1))
    return torch.where(n > 0, 1 - k.double() / n, 0.0)

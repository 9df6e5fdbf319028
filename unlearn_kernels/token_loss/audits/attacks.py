"""Membership attacks on the tokens of a table: loss, zlib, reference, Min-K, Min-K++. Low scores: seen in training."""

import warnings
import zlib
from collections.abc import Sequence
from typing import Final, Literal

import torch
from torch import Tensor

from unlearn_kernels.token_loss._options import check_dialect
from unlearn_kernels.token_loss.audits.table import TokenTable

_LEAST_VARIANCE: Final = 1e-6


def published(table: TokenTable) -> Tensor:
    """Which tokens open-unlearning's `tokenwise_logprobs` keeps, (M,).

    All but a sample's last, which it takes for the end of the text; and none of a sample whose first position has a
    label, since the slice then begins at -1: a warning says so where that leaves nothing at all. It also returns what
    lies in holes of the labels, as if it counted; here that is left out.
    """
    keep = torch.ones_like(table.hit)
    keep[(table.lengths.cumsum(0) - 1)[table.lengths > 0]] = False
    keep[(table.counts > table.lengths)[table.samples]] = False
    if len(keep) and not keep.any():
        warnings.warn(
            "no token of any sample is left as published: first positions have labels (batches without labels?), or "
            "samples have one token; give labels of answers alone, or fixed=True",
            RuntimeWarning,
            stacklevel=3,
        )
    return keep


def loss_attack(table: TokenTable, *, fixed: bool = False) -> Tensor:
    r"""The mean negative log-likelihood, `n_s / |y_s|`, (N,) float64.

    Args:
        table: of the model under attack.
        fixed: divide by the tokens that were summed, where the published code counts labels before the shift.

    Source: Yeom et al. 2018 (arXiv 1709.01604), open-unlearning's `LOSSAttack`.
    """
    return table.loss(fixed=fixed)


def zlib_attack(table: TokenTable, texts: Sequence[str], *, fixed: bool = False) -> Tensor:
    r"""The loss over the text's size when compressed, `(n_s / |y_s|) / len(zlib(text))`, (N,) float64.

    Args:
        table: of the model under attack.
        texts: the samples' target texts, N.
        fixed: as in `loss_attack`.

    Raises:
        ValueError: if there are not N texts.

    Source: Carlini et al. 2021 (arXiv 2012.07805), open-unlearning's `ZLIBAttack`.
    """
    if len(texts) != len(table):
        raise ValueError(f"texts must be one a sample, {len(table)}, got {len(texts)}")
    sizes = torch.tensor([len(zlib.compress(text.encode("utf-8"))) for text in texts], dtype=torch.float64)
    return table.loss(fixed=fixed) / sizes


def reference_attack(table: TokenTable, reference: TokenTable, *, fixed: bool = False) -> Tensor:
    r"""The loss less that under a reference model, `n_s / |y_s| - r_s / |y_s|`, (N,) float64.

    Args:
        table: of the model under attack.
        reference: of the reference model, over the same samples.
        fixed: as in `loss_attack`.

    Raises:
        ValueError: if the keys or labels differ.

    Source: Carlini et al. 2021 (arXiv 2012.07805), open-unlearning's `ReferenceAttack`.
    """
    check_same(table, reference, "reference")
    if not torch.equal(table.labels, reference.labels):
        raise ValueError("reference must be of the same labels as table, got others")
    return table.loss(fixed=fixed) - reference.loss(fixed=fixed)


def min_k(
    table: TokenTable,
    k: float = 0.4,
    *,
    dialect: Literal["open_unlearning", "muse"] = "open_unlearning",
    fixed: bool = False,
) -> Tensor:
    r"""Minus the mean of the share k of tokens with the lowest log-likelihoods, (N,) float64.

    | dialect | tokens | how many | of none |
    |---|---|---|---|
    | open_unlearning | all but the last; none if the first position has a label | `max(1, int(k n))` | 0 |
    | muse | all | `int(k n)` | NaN, as for 5 % of 19 tokens |
    | with fixed | all | `max(1, int(k n))` | NaN |

    Args:
        table: of the model under attack.
        k: the share, in (0, 1].
        dialect: see above.
        fixed: see above.

    Raises:
        ValueError: if k is out of range or the dialect unknown.

    Source: Shi et al. 2023 (Min-K% Prob, arXiv 2310.16789), open-unlearning, muse_bench.
    """
    check_dialect(dialect, ("open_unlearning", "muse"))
    return _lowest(table, -table.nll.double(), k, dialect, fixed)


def min_k_plus_plus(table: TokenTable, k: float = 0.4, *, fixed: bool = False) -> Tensor:
    r"""Minus the mean of the lowest share k of normalised log-likelihoods, (N,) float64.

    .. math:: \frac{\log p_y - \mu}{\sigma}, \quad \mu = \sum_v p_v \log p_v, \quad
        \sigma^2 = \max\Big(10^{-6}, \sum_v p_v (\log p_v - \mu)^2\Big)

    The source forms the variance as a difference of moments, which cancels for confident rows; here it comes from
    moments about the peak.

    Args:
        table: of the model under attack.
        k: the share, in (0, 1].
        fixed: as in `min_k`.

    Raises:
        ValueError: if k is out of range.

    Source: Zhang et al. 2024 (Min-K%++, arXiv 2404.02936), open-unlearning's `MinKPlusPlusAttack`.
    """
    std = table.std.double().clamp_min(_LEAST_VARIANCE**0.5)
    return _lowest(table, (-table.nll.double() - table.mean.double()) / std, k, "open_unlearning", fixed)


def _lowest(table: TokenTable, values: Tensor, k: float, dialect: str, fixed: bool) -> Tensor:
    """Minus the mean of each sample's lowest values."""
    if not 0 < k <= 1:
        raise ValueError(f"k must be above 0 and at most 1, got {k}")
    whole = fixed or dialect == "muse"
    keep = torch.ones_like(table.hit) if whole else published(table)
    samples, values = table.samples[keep], values[keep]
    sizes = torch.bincount(samples, minlength=len(table))
    number = (sizes.double() * k).long()
    if fixed or dialect != "muse":
        number = torch.where(sizes > 0, number.clamp_min(1), 0)
    order = values.argsort(stable=True)
    order = order[samples[order].argsort(stable=True)]
    rank = torch.arange(len(order)) - (sizes.cumsum(0) - sizes)[samples[order]]
    chosen = order[rank < number[samples[order]]]
    sums = torch.zeros(len(table), dtype=torch.float64).index_add_(0, samples[chosen], values[chosen])
    scores = -sums / number
    return scores if whole else torch.where(sizes == 0, 0.0, scores)


def check_same(table: TokenTable, other: TokenTable, name: str) -> None:
    """Two tables of the same samples in the same order."""
    if table.keys != other.keys:
        raise ValueError(f"{name} must be of the same samples in the same order, got others")

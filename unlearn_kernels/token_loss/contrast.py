"""FLAT: f-divergences between a refusal's and a forgotten answer's probabilities."""

from collections.abc import Callable
from typing import Final, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack

from unlearn_kernels.token_loss._options import NllOptions, counting
from unlearn_kernels.token_loss.likelihood import Pair
from unlearn_kernels.token_loss.linear import linear_nll

Divergence = Literal["tv", "kl", "reverse_kl", "jeffrey", "squared_hellinger", "pearson", "neyman", "js"]

_LOG4: Final = 1.3862943611198906


def _js(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-a) + b + torch.nn.functional.softplus(-b) - _LOG4


# f(a, b), a the mean probability of the refusal's tokens and b that of the forgotten answer's.
_FORMULAS: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "tv": lambda a, b: (torch.tanh(b) - torch.tanh(a)) / 2,
    "kl": lambda a, b: -a + torch.exp(b - 1),
    "reverse_kl": lambda a, b: torch.expm1(a) - b,
    "jeffrey": lambda a, b: -a + b + b**2 / 4 + b**3 / 16,
    "squared_hellinger": lambda a, b: a.exp() + (-b).exp() - 2,
    "pearson": lambda a, b: -a + b + b**2 / 4,
    "neyman": lambda a, b: a.exp() + 1 - 2 * (1 - b).sqrt(),
    "js": _js,
}
# Those whose descent raises b and lowers a, the wrong way round.
_REVERSED: Final = ("reverse_kl", "squared_hellinger")


def flat(
    forget: Pair,
    refusal: Pair,
    W: Tensor,
    *,
    divergence: Divergence = "tv",
    fixed: bool = False,
    **options: Unpack[NllOptions],
) -> Tensor:
    r"""Forgetting by contrast with a refusal alone, without retain data or a reference.

    .. math:: f(a, b), \qquad a = \frac{1}{B T} \sum_{st} p_{st}^{\text{refusal}}, \quad
        b = \frac{1}{B T} \sum_{st} p_{st}^{\text{forget}}, \quad p_{st} = e^{-n_{st}}

    As published the means run over every position, and those that do not count give 0: long prompts weaken the loss.
    "reverse_kl" and "squared_hellinger" have `df/db < 0` and `df/da > 0`: descent raises the answer to be forgotten.

    Args:
        forget: hidden states (*, d), shifted, and labels (*) of the answers to be forgotten.
        refusal: the same of the answers wanted instead; its shape may differ.
        W: the head, (V, d).
        divergence: "tv" (FLAT's default), "kl", "reverse_kl", "jeffrey", "squared_hellinger", "pearson", "neyman" or
            "js".
        fixed: means over the tokens that count (0 if there are none), and f(-a, -b) for the two divergences above.
        options: see `NllOptions`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or the divergence is unknown.

    Scratch: that of `linear_nll` on one batch at a time.

    Source: Wang et al. 2024 (FLAT, arXiv 2410.11143) and its code.
    """
    if divergence not in _FORMULAS:
        raise ValueError(f"divergence must be one of {', '.join(_FORMULAS)}, got {divergence!r}")
    a, b = (_mean_probability(pair, W, fixed, options) for pair in (refusal, forget))
    reverse = fixed and divergence in _REVERSED
    return _FORMULAS[divergence](-a if reverse else a, -b if reverse else b)


def _mean_probability(pair: Pair, W: Tensor, fixed: bool, options: NllOptions) -> Tensor:
    h, labels = pair
    nll, kept = linear_nll(h, W, labels, **options), counting(labels, options)
    total = torch.where(kept, (-nll).exp(), 0.0).sum()
    return total / (kept.sum().clamp_min(1) if fixed else max(labels.numel(), 1))

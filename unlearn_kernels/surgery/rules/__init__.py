"""The published rules that turn a Gramian into weights, by name."""

from typing import Any, Final

from torch import Tensor

from unlearn_kernels.surgery._lists import check_choice
from unlearn_kernels.surgery.rules.balance import IMTLG, AlignedMTL, ConFIG, NGDiff
from unlearn_kernels.surgery.rules.bargain import MUNBa, NashMTL
from unlearn_kernels.surgery.rules.dual_cone import DualProj, UPGrad
from unlearn_kernels.surgery.rules.fixed import Constant, Mean, Sum
from unlearn_kernels.surgery.rules.pairwise import GradVac, PCGrad
from unlearn_kernels.surgery.rules.protect import AGEM, BLUR, GRU
from unlearn_kernels.surgery.rules.rule import Rule
from unlearn_kernels.surgery.rules.simplex import MGDA, CAGrad

RULES: Final[dict[str, type[Rule]]] = {
    rule.name: rule
    for rule in (
        *(AGEM, GRU, BLUR, NGDiff, MUNBa, PCGrad, GradVac, MGDA, CAGrad, IMTLG, AlignedMTL),
        *(NashMTL, UPGrad, DualProj, ConFIG, Mean, Sum, Constant),
    )
}


def make_rule(rule: str | Rule, **options: Any) -> Rule:
    """The rule of a name with its options, or the rule that is given.

    Raises:
        ValueError: if there is no such rule, or a rule comes with options.
        TypeError: if it takes no such option.
    """
    if isinstance(rule, Rule):
        if options:
            raise ValueError(f"options must be given when the rule is made, got {sorted(options)} beside it")
        return rule
    check_choice("rule", rule, tuple(RULES))
    return RULES[rule](**options)


def weights(gramian: Tensor, rule: str | Rule, **options: Any) -> Tensor:
    r"""How much of every gradient a published rule takes, from their inner products alone.

    .. math:: w = \mathrm{rule}(G), \qquad g = \sum_k w_k g_k

    Args:
        gramian: (..., K, K) of any floating-point dtype, as from `gramian`. Leading dimensions, such as a Gramian
            for every tensor, are independent problems.
        rule: a name of `RULES`, or a rule such as `rules.CAGrad(c=0.5)`. One with a memory (`gradvac`, or any with
            a generator) is made once and given here at every step.
        options: of the rule, where it is named.

    Returns:
        (..., K) float64 on the device of `gramian`, computed in float64. Rules whose `waits` is false have no
        host synchronisation on CUDA. All weights are NaN where a Gramian has a NaN or an infinity. Scaling a
        Gramian does not change them, but for `ngdiff`, `munba` and the norm that `nash_mtl` is clipped to.
        Not differentiable.

    Raises:
        ValueError: if there is no such rule, an option is out of range, the Gramian is not square or floating
            point, or its K is not what the rule takes.
        TypeError: if the rule has no such option.

    Scratch: `8 K^2 2^K` bytes a problem for `mgda`, `cagrad`, `upgrad` and `dualproj` up to K = 10, otherwise some
    `8 K^2` bytes.
    """
    return make_rule(rule, **options)(gramian)


__all__ = [
    "AGEM",
    "BLUR",
    "GRU",
    "IMTLG",
    "MGDA",
    "RULES",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "DualProj",
    "GradVac",
    "MUNBa",
    "Mean",
    "NGDiff",
    "NashMTL",
    "PCGrad",
    "Rule",
    "Sum",
    "UPGrad",
    "make_rule",
    "weights",
]

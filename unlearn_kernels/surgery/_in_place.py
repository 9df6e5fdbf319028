"""Rules of `project_conflict_` that are no weighted sum with weights from one Gramian."""

from typing import Any, ClassVar, NoReturn

from torch import Tensor

from unlearn_kernels.surgery._conflict_rules import RULES, request
from unlearn_kernels.surgery.rules import RULES as WEIGHTED
from unlearn_kernels.surgery.rules import Rule, make_rule


class InPlace(Rule):
    """`gdr_gma`, `doco`, `sago` or `graddrop`: one call that writes to the forget gradient.

    Args:
        name: which.
        options: of `project_conflict_`.

    Raises:
        ValueError: for an option that the rule does not have.
    """

    sets: ClassVar[int | None] = 2
    one_sided: ClassVar[bool] = True

    def __init__(self, name: str, **options: Any) -> None:
        request(name, None, options, None, None, True)
        self.name, self.options = name, options  # type: ignore[misc]

    def solve(self, gramian: Tensor) -> Tensor:
        """There are no weights."""
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raises ValueError, where one call does not do."""
        raise ValueError(
            f"rule {self.name!r} works on whole, unscaled gradients: not with ema, a scaler or sharded gradients"
        )

    def in_one_call(self) -> dict[str, Any]:
        """The rule, which skips a step that is not finite."""
        return {"rule": self.name, "skip_nonfinite": True, **self.options}


def any_rule(rule: str | Rule, **options: Any) -> Rule:
    """A rule of either kind; weights come first where a name is of both.

    Raises:
        ValueError: as `make_rule`, and as `InPlace`.
    """
    if isinstance(rule, str) and rule in RULES and rule not in WEIGHTED:
        return InPlace(rule, **options)
    return make_rule(rule, **options)

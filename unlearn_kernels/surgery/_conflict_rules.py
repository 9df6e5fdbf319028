"""The rules of `project_conflict_` by name: where each applies, and the numbers that it knows."""

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from unlearn_kernels.reference import surgery_rules as numbered
from unlearn_kernels.reference.surgery_rules import Options
from unlearn_kernels.surgery import _lists

Rule = Literal["agem", "pcgrad", "gru", "blur", "gdr_gma", "doco", "sago", "graddrop"]
ConflictScope = Literal["global", "group", "tensor", "row", "element"]
SCOPES: Final = {**_lists.SCOPES, "element": 4}
_SUMMED: Final = tuple(_lists.SCOPES)


class _Known(NamedTuple):
    number: int
    scopes: tuple[str, ...]  # the published one first
    options: Mapping[str, Any]


RULES: Final = {
    "agem": _Known(numbered.AGEM, (*_SUMMED, "element"), {"gamma": 1.0, "alpha": 0.0, "eps": 0.0}),
    "pcgrad": _Known(numbered.PCGRAD, (*_SUMMED, "element"), {"gamma": 1.0, "alpha": 1.0}),
    "gru": _Known(numbered.GRU, _SUMMED, {"cosine_clip": float("inf")}),
    "blur": _Known(numbered.BLUR, _SUMMED, {"gamma": 1.0, "alpha": 1.0, "eps": 0.0, "lower": True}),
    "gdr_gma": _Known(numbered.GDR_GMA, ("tensor", "global", "group", "row"), {"lam": 0.5, "compat": False}),
    "doco": _Known(
        numbered.DOCO, ("tensor", "global", "group", "row"), {"lam": 1.0, "eps": 1e-8, "compat": False}
    ),
    "sago": _Known(numbered.SAGO, ("element",), {"gamma": 1.0, "alpha": 1.0, "keep_retain": False}),
    "graddrop": _Known(numbered.GRADDROP, ("element",), {"leak": (0.0, 0.0), "seed": 0}),
}


class Request(NamedTuple):
    """A projection as the raw operator takes it, but for the lists and their groups."""

    rule: int
    scope: str
    options: Options
    flags: int
    seed: int


def request(
    rule: str,
    scope: str | None,
    given: Mapping[str, Any],
    max_norm: float | None,
    max_result_norm: float | None,
    skip_nonfinite: bool,
) -> Request:
    """What is asked for, with the rule's own scope and numbers where none are `given` (None).

    Raises:
        ValueError: for a rule, scope or option that is unknown or does not fit the others.
    """
    _lists.check_choice("rule", rule, tuple(RULES))
    known = RULES[rule]
    scope = known.scopes[0] if scope is None else scope
    if scope not in known.scopes:
        _lists.check_choice(f"scope of {rule}", scope, known.scopes)
    options = {**known.options, **{name: value for name, value in given.items() if value is not None}}
    for name in options.keys() - known.options.keys():
        raise ValueError(f"{name} is no option of rule {rule!r}, which has {', '.join(known.options)}")
    clipped = max_norm is not None or max_result_norm is not None
    if clipped and scope == "element":
        raise ValueError("max_norm and max_result_norm need inner products: not for scope 'element'")
    if rule == "gru" and options["cosine_clip"] < 0:
        raise ValueError(f"cosine_clip must not be negative, got {options['cosine_clip']}")
    flags = (
        numbered.COMPAT * bool(options.get("compat"))
        | numbered.UPPER * (not options.get("lower", True))
        | numbered.KEEP_RETAIN * bool(options.get("keep_retain"))
        | numbered.SKIP_NONFINITE * skip_nonfinite
    )
    return Request(
        known.number, scope, _numbers(options, max_norm, max_result_norm), flags, options.get("seed", 0)
    )


def _numbers(options: Mapping[str, Any], max_norm: float | None, max_result_norm: float | None) -> Options:
    forget, retain = options.get("leak", (0.0, 0.0))
    for name, norm in (("max_norm", max_norm), ("max_result_norm", max_result_norm)):
        if norm is not None and not norm > 0:
            raise ValueError(f"{name} must be positive, got {norm}")
    return Options(
        **{
            name: float(options[name])
            for name in ("gamma", "alpha", "eps", "lam", "cosine_clip")
            if name in options
        },
        max_norm=float("inf") if max_norm is None else float(max_norm),
        max_result_norm=float("inf") if max_result_norm is None else float(max_result_norm),
        leak_forget=float(forget),
        leak_retain=float(retain),
    )

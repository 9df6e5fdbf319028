"""Runs every operator on every backend that works here, on tiny inputs, against the float64 reference."""

from collections.abc import Callable
from typing import Any, Final

import torch

from unlearn_kernels._backends import REGISTRY, Impl, Operator
from unlearn_kernels._samples import SAMPLES, Arguments, results
from unlearn_kernels.testing import assert_as_exact_as

PASSED: Final = "passed"
# Inputs are float32; a result kept in float64 may still carry their products' rounding.
_ROUNDING: Final = 4 * torch.finfo(torch.float32).eps


def run() -> dict[str, dict[str, str]]:
    """The outcome of each implementation that can run here: `passed`, or what went wrong."""
    return {
        name: {b: _outcome(operator, i) for b, i in operator.impls.items() if b != "reference" and _runs(i)}
        for name, operator in REGISTRY.items()
    }


def _runs(impl: Impl) -> bool:
    return impl.reason_unavailable() is None


def _outcome(operator: Operator, impl: Impl) -> str:
    try:
        _check(operator, impl)
    except Exception as error:  # a broken operator is a line of the report, not the end of it
        return f"{type(error).__name__}: {error}"
    return PASSED


def _check(operator: Operator, impl: Impl) -> None:
    make, reference = SAMPLES[operator.name], operator.impls["reference"].call
    device = impl.devices[0]

    def run(call: Callable[..., Any], arguments: Arguments) -> list[torch.Tensor]:
        return results(call, arguments, differentiable=operator.differentiable)

    actual, eager = (run(call, make(torch.float32, device)) for call in (impl.call, reference))
    exact = run(reference, _doubled(make(torch.float32, device)))
    for index, (ours, wanted, plain) in enumerate(zip(actual, exact, eager, strict=True)):
        floor = _ROUNDING if ours.is_floating_point() else 0.0
        assert_as_exact_as(f"result {index}", ours, wanted, plain, floor=floor)


def _doubled(value: Any) -> Any:
    """The arguments with every floating-point tensor in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(_doubled(item) for item in value)
    return value

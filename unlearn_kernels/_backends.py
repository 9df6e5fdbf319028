"""Which implementation of an operator runs: the `backend=` argument, then `use_backend`, then
`UNLEARN_KERNELS_BACKEND`, then the default of the device. Only defaults fall back."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from unlearn_kernels import _env

Backend = Literal["reference", "cpp", "triton", "cuda"]
BACKENDS: Final[tuple[str, ...]] = get_args(Backend)
FLOATS: Final = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UP_TO_SINGLE: Final = (torch.float32, torch.bfloat16, torch.float16)
# CUDA C++ runs where it is asked for, until it has been measured against Triton on a device.
_DEFAULTS: Final = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


def _never() -> str | None:
    return None


@dataclass(frozen=True)
class Impl:
    """One implementation of one operator. `reason_unavailable()` is None, or a sentence that says why not."""

    backend: str
    call: Callable[..., Any]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    reason_unavailable: Callable[[], str | None] = _never

    def problem(self, tensors: Sequence[Tensor]) -> str | None:
        """Why this implementation cannot take these tensors, or None."""
        reason = self.reason_unavailable()
        if reason is not None:
            return reason
        for x in tensors:
            if x.device.type not in self.devices:
                return f"it runs on {' and '.join(self.devices)}, the tensors are on {x.device.type}"
            if x.is_floating_point() and x.dtype not in self.dtypes:
                return f"it does not take {x.dtype}"
        return None


@dataclass(frozen=True)
class Operator:
    """A row of the operator table, if registered. `formula` and `family` are what the documentation shows."""

    name: str
    family: str
    formula: str
    impls: dict[str, Impl] = field(default_factory=dict)
    differentiable: bool = False


REGISTRY: Final[dict[str, Operator]] = {}


def register(operator: Operator) -> Operator:
    REGISTRY[operator.name] = operator
    return operator


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _from_environment(variable: str) -> str | None:
    name = _env.get(variable)
    return _checked(name, variable) if name else None


class _Selection:
    """The backend that `use_backend` and the environment ask for."""

    name: str | None = _from_environment("UNLEARN_KERNELS_BACKEND")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Runs every call inside the block that names no backend on `name`.

    It holds for the whole process: calls of other threads see it too, and two threads that enter and leave
    blocks at the same time can leave one's choice behind. Where threads differ, pass `backend=`.

    Raises:
        ValueError: if `name` is no backend.
    """
    before = _Selection.name
    _Selection.name = _checked(name, "name")
    try:
        yield
    finally:
        _Selection.name = before


def requested(backend: str | None) -> str | None:
    """What a call with this argument asks for, or None: the default, which may fall back."""
    return backend if backend is not None else _Selection.name


def select(operator: str | Operator, backend: str | None, tensors: Sequence[Tensor]) -> Callable[..., Any]:
    """The implementation of `operator`, or of the one of that name, that will run on `tensors`.

    Raises:
        ValueError: if `backend` is no backend.
        BackendError: if the backend that was asked for cannot run; says what would.
    """
    operator = REGISTRY[operator] if isinstance(operator, str) else operator
    impls, asked = operator.impls, requested(backend)
    if asked is not None:
        _checked(asked, "backend")
        problem = impls[asked].problem(tensors) if asked in impls else "it has no such implementation"
        if problem is not None:
            raise BackendError(_refusal(operator, asked, problem, tensors))
        return impls[asked].call
    for name in _DEFAULTS.get(tensors[0].device.type if tensors else "cpu", ("reference",)):
        if name in impls and impls[name].problem(tensors) is None:
            if name == "reference":
                _warn_slow(operator.name, impls, tensors)
            return impls[name].call
    raise BackendError(_refusal(operator, "default", "no implementation takes these tensors", tensors))


def _refusal(operator: Operator, asked: str, problem: str, tensors: Sequence[Tensor]) -> str:
    works = [name for name, impl in operator.impls.items() if impl.problem(tensors) is None]
    advice = (
        f"Pass backend={works[0]!r} or name no backend."
        if works
        else "Move the tensors or change their dtype."
    )
    return (
        f"{operator.name}: backend {asked!r} was requested but {problem}. "
        f"Available here: {', '.join(works) or 'none'}. {advice}"
    )


_warned: Final[set[str]] = set()


def _warn_slow(operator: str, impls: dict[str, Impl], tensors: Sequence[Tensor]) -> None:
    if operator in _warned or torch.compiler.is_compiling():
        return
    _warned.add(operator)
    reasons = "; ".join(f"{n}: {p}" for n, impl in impls.items() if (p := impl.problem(tensors)) is not None)
    warnings.warn(f"{operator} runs on the slow reference path ({reasons})", RuntimeWarning, stacklevel=4)

"""What can be measured: cases, the providers that race in each of them, and how to find them."""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

Role = Literal["ours", "plain", "peer"]
Bandwidth = Literal["read", "axpy"]


@dataclass(frozen=True)
class Call:
    """One measurable call. `reset`, untimed before each `run`, undoes what `run` did to its inputs or warms up."""

    run: Callable[[], Any]
    reset: Callable[[], object] | None = None


@dataclass(frozen=True)
class Provider:
    """Somebody who can do the work of a case.

    `build` imports what it needs, prepares what the peer would find prepared, and returns the call. A
    provider whose numbers come from its own random draw brings an `error` and a `bound` of its own.
    `yardstick` marks other work than the case's (a plain forward+backward): its time is a unit of measure,
    its output is not judged.
    """

    name: str
    build: Callable[[Any], Call]
    role: Role = "peer"
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiled: bool = False
    yardstick: bool = False
    error: Callable[[Any, Any, Any], float] | None = None
    bound: float | None = None

    def missing(self) -> tuple[str, ...]:
        """The modules that this provider requires and that are not installed."""
        return tuple(name for name in self.requires if importlib.util.find_spec(name) is None)


@dataclass(frozen=True)
class Case:
    """An operator at one shape of a real model, in one dtype, and the providers that race in it.

    `bound` is the largest relative error (against `reference`, computed in float64) at which our own number
    counts; `relative_to` names a provider whose own error, doubled, raises it. Peers are held to
    `peer_bound`: that they compute the same quantity at all. `warm` is the same case at a small shape.
    `flops` and `bytes` are the least that the algorithm needs, not what a provider spends. `memory_unit`, in
    bytes, is what extra memory is told in besides: `units` in the row's metrics.
    """

    name: str
    ops: tuple[str, ...]
    shape: str
    dtype: torch.dtype
    flops: int
    bytes: int
    make: Callable[[str], Any]
    reference: Callable[[Any], Any]
    error: Callable[[Any, Any, Any], float]
    providers: tuple[Provider, ...]
    bound: float
    peer_bound: float = 1e-2
    relative_to: str | None = None
    bandwidth: Bandwidth = "read"
    threads: int | None = None
    warm: Case | None = None
    metrics: Callable[[Any, Any, Any], dict[str, float]] | None = field(default=None)
    memory_unit: int | None = None

    def __post_init__(self) -> None:
        names = [provider.name for provider in self.providers]
        if len(set(names)) != len(names):
            raise ValueError(f"providers: names must differ, got {names}")
        if not any(provider.role == "ours" for provider in self.providers):
            raise ValueError(f"providers: {self.name} has none with role 'ours'")

    @property
    def dtype_name(self) -> str:
        """The dtype as the tables print it."""
        return str(self.dtype).removeprefix("torch.")

    def provider(self, name: str) -> Provider | None:
        """The provider of that name, if it takes part."""
        return next((p for p in self.providers if p.name == name), None)


_cases: dict[str, Case] = {}


def register(case: Case) -> Case:
    """Add a case; its name must be new."""
    if case.name in _cases:
        raise ValueError(f"name: case {case.name!r} is registered already")
    _cases[case.name] = case
    return case


def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of registration; imports the case modules the first time."""
    import benchmarks.cases as package

    for module in sorted(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")):
        importlib.import_module(module)
    return tuple(_cases.values())


def cases_of(op: str) -> tuple[Case, ...]:
    """The cases that measure an operator, by its name in `torch.ops.unlearn_kernels`."""
    return tuple(case for case in all_cases() if op in case.ops)


def select(patterns: Iterable[str]) -> tuple[Case, ...]:
    """The cases whose name has a part that matches, as a glob, any of the patterns; all without a pattern."""
    wanted = tuple(patterns)
    cases = all_cases()
    if not wanted:
        return cases
    matches = {pattern: {c.name for c in cases if _has_part(c.name, pattern)} for pattern in wanted}
    for pattern, names in matches.items():
        if not names:
            raise ValueError(f"PATTERN: no case matches {pattern!r}; `python -m benchmarks list` shows them")
    return tuple(case for case in cases if any(case.name in names for names in matches.values()))


def _has_part(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, f"*{pattern}*")

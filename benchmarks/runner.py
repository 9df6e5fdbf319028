"""Run a case: check every provider's numbers, measure its memory, then time all of them in turns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from benchmarks import memory
from benchmarks.floors import Floor
from benchmarks.registry import Call, Case, Provider
from benchmarks.results import OK, Row, judge, set_ratios

# A worker thread of one library spins for about a millisecond after its last parallel region.
_SETTLE_SECONDS = 0.002
# A sample shorter than this is the mean of several calls.
_SAMPLE_SECONDS = 0.005
_WARM_CALLS = 2
# Several times what a GPU's cache holds.
_CACHE_BYTES = 1 << 28


@dataclass(frozen=True)
class Settings:
    """How a run goes. `time_limit` is in seconds per case; one with a longer single call is skipped."""

    peers: bool = False
    repeats: int = 30
    time_limit: float = 60.0
    threads: int | None = None
    device: str = "cpu"


@dataclass
class Contestant:
    """A provider that takes part in the timing: its first call took `first` seconds."""

    row: Row
    call: Call
    first: float
    quota: int = 0
    number: int = 1
    samples: list[float] = field(default_factory=list)


class Race:
    """One case on one machine. `facts` go into every row; `progress` is told what happens."""

    def __init__(
        self,
        case: Case,
        settings: Settings,
        floor: Floor,
        facts: dict[str, Any] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._case, self._settings, self._floor = case, settings, floor
        self._facts, self._progress = facts or {}, progress
        self._device = settings.device
        self._rows: list[Row] = []
        self._contestants: list[Contestant] = []

    def run(self) -> list[Row]:
        """All rows of the case. A provider that is missing, fails or is wrong gets a row that says so."""
        torch.set_num_threads(self._floor.threads)
        self._floor.reset()
        self._check_all()
        self._set_quotas()
        self._take_turns()
        for contestant in self._contestants:
            samples = contestant.samples or [contestant.first]
            row = contestant.row
            row.seconds, row.seconds_min, row.repeats = statistics.median(samples), min(samples), len(samples)
        for row in self._rows:
            row.floor_seconds, row.floor = self._floor.seconds(self._case), self._floor.record()
        set_ratios(self._rows, frozenset(p.name for p in self._case.providers if p.yardstick))
        return self._rows

    def _check_all(self) -> None:
        self._progress("inputs and float64 reference")
        failure = None
        try:
            inputs = self._case.make(self._device)
            reference = self._case.reference(inputs)
        except Exception as error:
            failure = f"no reference: {_failure(error)}"
        for provider in self._case.providers:
            if provider.role == "peer" and not self._settings.peers:
                continue
            self._progress(f"check {provider.name}")
            row = self._new_row(provider)
            row.status = failure or self._obstacle(provider) or OK
            if row.status == OK:
                self._first_call(provider, inputs, reference, row)
        self._judge()

    def _new_row(self, provider: Provider) -> Row:
        case = self._case
        row = Row(
            case.name,
            list(case.ops),
            case.shape,
            case.dtype_name,
            self._device,
            self._floor.threads,
            provider.name,
            provider.role,
            flops=case.flops,
            bytes=case.bytes,
            **self._facts,
        )
        self._rows.append(row)
        return row

    def _obstacle(self, provider: Provider) -> str | None:
        """Why a provider cannot take part, if so."""
        missing = provider.missing()
        if missing:
            return f"not installed: {', '.join(missing)}"
        if self._device not in provider.devices:
            return f"not on {self._device}"
        if self._case.warm is None or provider.compiled:
            return None
        try:
            warm = self._case.warm
            expected = self._warm_up(provider, warm) * self._case.flops / warm.flops
        except Exception as error:
            return _failure(error)
        if expected > self._settings.time_limit:
            return f"skipped: a call would take about {expected:.0f} s"
        return None

    def _warm_up(self, provider: Provider, small: Case) -> float:
        """What a call at the small shape should take, after one that initialises libraries.

        Told by one thread: threads that wait for each other on a busy machine say little about more work.
        """
        call = provider.build(small.make(self._device))
        _timed(call, self._device)
        torch.set_num_threads(1)
        try:
            seconds = min(_timed(call, self._device) for _ in range(_WARM_CALLS))
            return seconds / self._floor.threads if self._device == "cpu" else seconds
        finally:
            torch.set_num_threads(self._floor.threads)

    def _first_call(self, provider: Provider, inputs: Any, reference: Any, row: Row) -> None:
        """The first call at full size: its output is checked, its memory measured."""
        case = self._case
        try:
            call = provider.build(inputs)
            if provider.compiled or case.warm is None:
                _timed(call, self._device)
            if call.reset:
                call.reset()
            measured = memory.measure(call.run, inputs, self._device)
            row.peak_bytes, row.output_bytes = measured.peak_bytes, measured.output_bytes
            if not provider.yardstick:
                row.error = (provider.error or case.error)(inputs, measured.output, reference)
                row.metrics = self._metrics(provider, inputs, measured.output, reference)
            if case.memory_unit and measured.peak_bytes is not None:
                row.metrics["units"] = measured.peak_bytes / case.memory_unit
        except Exception as error:
            row.status = _failure(error)
            return
        self._contestants.append(Contestant(row, call, measured.seconds))

    def _metrics(self, provider: Provider, inputs: Any, output: Any, reference: Any) -> dict[str, float]:
        """The case's further figures, for providers that compute the case's own quantity."""
        if self._case.metrics is None or provider.error is not None:
            return {}
        found = self._case.metrics(inputs, output, reference)
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _judge(self) -> None:
        """Set the bounds, find the wrong ones, and take them out of the race."""
        case = self._case
        plain = next((r.error for r in self._rows if r.provider == case.relative_to and r.error), 0.0)
        ours = max(case.bound, 2 * plain) if math.isfinite(plain) else case.bound
        for row in self._rows:
            provider = case.provider(row.provider)
            if row.error is not None and provider is not None:
                row.bound = provider.bound or (ours if row.role == "ours" else max(case.peer_bound, ours))
            judge(row)
        self._contestants = [c for c in self._contestants if c.row.status == OK]

    def _set_quotas(self) -> None:
        """Samples per provider: as many as fit its share of the time; none if the first call took it all."""
        share = self._settings.time_limit / max(1, len(self._contestants))
        for contestant in tuple(self._contestants):
            if contestant.first > share:
                continue
            self._progress(f"pace {contestant.row.provider}")
            try:
                # The first call touched fresh memory; this one tells the pace.
                pace = max(_timed(contestant.call, self._device), 1e-9)
            except Exception as error:
                contestant.row.status = _failure(error)
                self._contestants.remove(contestant)
                continue
            contestant.quota = max(1, min(self._settings.repeats, int(share / pace)))
            contestant.number = 1 if contestant.call.reset else max(1, round(_SAMPLE_SECONDS / pace))

    def _take_turns(self) -> None:
        """Time the contestants round-robin, starting from another one in every round."""
        rounds = max((c.quota for c in self._contestants), default=0)
        for index in range(rounds):
            self._progress(f"round {index + 1} of {rounds}")
            self._floor.sample()
            turn = index % len(self._contestants)
            for contestant in self._contestants[turn:] + self._contestants[:turn]:
                if index < contestant.quota:
                    time.sleep(_SETTLE_SECONDS)
                    contestant.samples.append(_timed(contestant.call, self._device, contestant.number))


def _timed(call: Call, device: str, number: int = 1) -> float:
    if call.reset:
        call.reset()
    if device == "cuda":
        return _timed_on_device(call, number)
    started = time.perf_counter()
    for _ in range(number):
        call.run()
    return (time.perf_counter() - started) / number


def _timed_on_device(call: Call, number: int) -> float:
    """By events, each call after a write that takes its inputs out of the cache and covers its first launch."""
    other = _other_memory()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
    torch.cuda.synchronize()
    for begin, end in events:
        other.zero_()
        begin.record()
        call.run()
        end.record()
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in events) / 1000 / number


@cache
def _other_memory() -> torch.Tensor:
    return torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")


def _failure(error: Exception) -> str:
    first = str(error).strip().splitlines()[:1] or [""]
    return f"failed: {type(error).__name__}: {first[0][:160]}"

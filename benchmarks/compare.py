"""Compare two result files: pure functions over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.results import OK, Row

_MEMORY_NOISE = 1 << 20


@dataclass(frozen=True)
class Change:
    """One measurement in both files. `time` and `memory` are B over A, None where one side has no figure.

    `time` compares times in units of each file's own floor where both files have it: that cancels the
    machine's speed on the day. `unit` says which it was.
    """

    case: str
    provider: str
    verdict: str
    unit: str
    time: float | None
    memory: float | None

    @property
    def regressed(self) -> bool:
        """Whether B is worse."""
        return self.verdict in ("slower", "more memory", "lost")


def compare(before: Sequence[Row], after: Sequence[Row], tolerance: float = 0.10) -> list[Change]:
    """Our own rows of two runs, matched by case, provider, device and threads.

    A change counts from `tolerance` on; memory also has to grow by a megabyte. Verdicts: `same`, `faster`,
    `slower`, `more memory`, `lost` (ok before, not ok or absent now), `gained`, and `not measured` where
    neither has a number.
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance: must be between 0 and 1, got {tolerance}")
    old, new = _ours(before), _ours(after)
    return [
        _change(old.get(key), new.get(key), tolerance) for key in [*old, *(k for k in new if k not in old)]
    ]


def _ours(rows: Sequence[Row]) -> dict[tuple[str, str, str, int], Row]:
    return {row.key: row for row in rows if row.role == "ours"}


def _change(old: Row | None, new: Row | None, tolerance: float) -> Change:
    some = old or new
    assert some is not None
    had, has = old is not None and old.status == OK, new is not None and new.status == OK
    if not (had and has):
        verdict = "lost" if had else "gained" if has else "not measured"
        return Change(some.case, some.provider, verdict, "", None, None)
    assert old is not None
    assert new is not None
    unit, time = _time_ratio(old, new)
    memory = _memory_ratio(old, new)
    return Change(some.case, some.provider, _verdict(old, new, time, tolerance), unit, time, memory)


def _time_ratio(old: Row, new: Row) -> tuple[str, float | None]:
    if old.vs_floor and new.vs_floor:
        return "floors", new.vs_floor / old.vs_floor
    if old.seconds and new.seconds:
        return "seconds", new.seconds / old.seconds
    return "", None


def _memory_ratio(old: Row, new: Row) -> float | None:
    if old.peak_bytes is None or new.peak_bytes is None:
        return None
    return max(new.peak_bytes, _MEMORY_NOISE) / max(old.peak_bytes, _MEMORY_NOISE)


def _verdict(old: Row, new: Row, time: float | None, tolerance: float) -> str:
    if time is not None and time > 1 + tolerance:
        return "slower"
    memory = _memory_ratio(old, new)
    if memory is not None and memory > 1 + tolerance and _grown(old, new) > _MEMORY_NOISE:
        return "more memory"
    return "faster" if time is not None and time < 1 / (1 + tolerance) else "same"


def _grown(old: Row, new: Row) -> int:
    return (new.peak_bytes or 0) - (old.peak_bytes or 0)

"""Rows of a result file, the ratios between them, and reading and writing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
OK, WRONG = "ok", "WRONG"


@dataclass
class Row:
    """One provider in one case. Ratios are this provider's seconds over the other's: below 1 is faster."""

    case: str
    ops: list[str]
    shape: str
    dtype: str
    device: str
    threads: int
    provider: str
    role: str
    status: str = OK
    seconds: float | None = None
    seconds_min: float | None = None
    repeats: int = 0
    peak_bytes: int | None = None
    output_bytes: int | None = None
    error: float | None = None
    bound: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    flops: int = 0
    bytes: int = 0
    floor_seconds: float | None = None
    vs_floor: float | None = None
    vs_plain: float | None = None
    vs_peers: dict[str, float] = field(default_factory=dict)
    floor: dict[str, Any] = field(default_factory=dict)
    machine: str = ""
    isa: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    date: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What makes the row the same measurement in another file."""
        return self.case, self.provider, self.device, self.threads


def judge(row: Row) -> None:
    """Set the status to WRONG where the error is above the bound; one that is not finite has no figure."""
    if row.status != OK or row.error is None:
        return
    if not math.isfinite(row.error):
        row.status, row.error = WRONG, None
    elif row.bound is not None and row.error > row.bound:
        row.status = WRONG


def set_ratios(rows: Sequence[Row], yardsticks: frozenset[str] = frozenset()) -> None:
    """Fill in the ratios among the rows of one case; rows that are not ok neither get nor give any.

    Providers named in `yardsticks` do other work than the case's, so they stand in `vs_plain` only.
    """
    counted = [row for row in rows if row.status == OK and row.seconds]
    plain = next((row for row in counted if row.role == "plain"), None)
    for row in counted:
        assert row.seconds is not None
        row.vs_plain = row.seconds / plain.seconds if plain and plain.seconds else None
        if row.provider in yardsticks:
            continue
        row.vs_floor = row.seconds / row.floor_seconds if row.floor_seconds else None
        others = (other for other in counted if other is not row and other.provider not in yardsticks)
        row.vs_peers = {other.provider: row.seconds / other.seconds for other in others if other.seconds}


def save(path: Path, run: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write a result file; an interrupted run leaves the rows of the cases that were complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"schema": SCHEMA, "run": run, "rows": [dataclasses.asdict(row) for row in rows]}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def load(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """The run record and the rows of a result file."""
    content = json.loads(path.read_text())
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: schema must be {SCHEMA}, got {content.get('schema')!r}")
    return content["run"], [Row(**row) for row in content["rows"]]

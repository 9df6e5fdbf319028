"""Results in the terminal: a table a case, and progress meanwhile; with rich where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.compare import Change
from benchmarks.registry import Case
from benchmarks.results import OK, WRONG, Row

COLUMNS = ("provider", "ms", "min", "÷ ours", "÷ plain", "÷ floor", "extra MB", "out MB", "error", "status")


def cells(row: Row, ours: str | None) -> tuple[str, ...]:
    """A row of the table, as text. `÷ ours` is how many times longer than our own row it took."""
    faster = row.vs_peers.get(ours) if ours else None
    return (
        row.provider,
        _number(row.seconds, 1e3),
        _number(row.seconds_min, 1e3),
        "1" if row.provider == ours and row.vs_peers else _number(faster),
        _number(row.vs_plain),
        _number(row.vs_floor),
        _megabytes(row.peak_bytes),
        _megabytes(row.output_bytes),
        "–" if row.error is None else f"{row.error:.1e}",
        _remarks(row),
    )


def _number(value: float | None, scale: float = 1.0) -> str:
    if value is None:
        return "–"
    return f"{value * scale:.3g}" if value * scale < 1000 else f"{value * scale:.0f}"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.1f}"


def _remarks(row: Row) -> str:
    """The status, with the bound where it was passed, and the case's further figures."""
    status = row.status
    if status == WRONG and row.error is not None:
        status = f"{WRONG} (bound {row.bound:.1e})"
    figures = ", ".join(f"{name} {value:.2g}" for name, value in row.metrics.items())
    return f"{status}: {figures}" if figures else status


def title(rows: Sequence[Row]) -> str:
    """The heading of a case's table: what ran and its floor."""
    first = rows[0]
    threads = f"{first.threads} thread{'s' if first.threads > 1 else ''}"
    text = f"{first.case}   {first.shape}   {threads}"
    if first.floor_seconds:
        rates = first.floor
        text += (
            f"\nfloor {first.floor_seconds * 1e3:.3g} ms"
            f" ({rates['fma_gflops']:.0f} GFLOP/s by {rates['fma_source']},"
            f" read {rates['read_gbs']:.1f}, axpy {rates['axpy_gbs']:.1f} GB/s)"
        )
    return text


def table(rows: Sequence[Row]) -> str:
    """The rows of one case as plain text."""
    ours = next((row.provider for row in rows if row.role == "ours"), None)
    return f"{title(rows)}\n{aligned([COLUMNS, *(cells(row, ours) for row in rows)])}\n"


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell: the first and the last to the left, the others to the right."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    last = len(widths) - 1

    def pad(text: str, index: int) -> str:
        if index == last:
            return text
        return text.ljust(widths[index]) if index == 0 else text.rjust(widths[index])

    return "\n".join("  " + "  ".join(pad(t, i) for i, t in enumerate(line)).rstrip() for line in lines)


def listing(cases: Sequence[Case]) -> str:
    """The cases that exist."""
    lines = [("case", "operators", "shape", "providers")]
    for case in cases:
        providers = ", ".join(p.name for p in case.providers)
        lines.append((case.name, " ".join(case.ops) or "–", case.shape, providers))
    return aligned(lines)


def differences(changes: Sequence[Change]) -> str:
    """The outcome of a comparison."""
    lines = [("case", "provider", "time B/A", "in", "memory B/A", "verdict")]
    for c in changes:
        lines.append((c.case, c.provider, _number(c.time), c.unit or "–", _number(c.memory), c.verdict))
    return aligned(lines)


class Screen:
    """Where a run tells how far it is and shows its tables."""

    def __init__(self, total: int, progress: Any = None) -> None:
        self._total, self._progress, self._done, self._name = total, progress, 0, ""
        self._task = progress.add_task("", total=total) if progress else None

    def start(self, name: str) -> None:
        """A case begins."""
        self._name = name
        if not self._progress:
            print(f"[{self._done + 1}/{self._total}] {name}", file=sys.stderr, flush=True)

    def step(self, text: str) -> None:
        """What the case is doing now."""
        if self._progress:
            self._progress.update(self._task, description=f"{self._name}: {text}")

    def finish(self, rows: Sequence[Row]) -> None:
        """A case has ended: show it."""
        self._done += 1
        if not self._progress:
            print(table(rows), flush=True)
            return
        self._progress.update(self._task, completed=self._done)
        self._progress.console.print(_rich_table(rows))


@contextmanager
def screen(total: int) -> Iterator[Screen]:
    """A progress bar when rich is installed and a person is watching, plain lines otherwise."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield Screen(total)
        return
    if not sys.stdout.isatty():
        yield Screen(total)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        yield Screen(total, progress)


def _rich_table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    ours = next((row.provider for row in rows if row.role == "ours"), None)
    made = Table(title=title(rows), title_justify="left")
    for index, column in enumerate(COLUMNS):
        made.add_column(column, justify="left" if index in (0, len(COLUMNS) - 1) else "right")
    for row in rows:
        style = "bold" if row.role == "ours" else "dim" if row.seconds is None else None
        made.add_row(*cells(row, ours), style="red" if row.status != OK and row.role == "ours" else style)
    return made

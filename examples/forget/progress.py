"""A progress bar: rich's on a terminal where it is installed, otherwise a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from .training import Progress

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def bar(title: str) -> Iterator[Progress]:
    """Yields `progress(done, total, note)`."""
    try:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Rich
    except ImportError:
        yield _lines(title)
        return
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console

    columns = (TextColumn("{task.description:<24}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    console = Console(stderr=True)
    with Rich(*columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console) as rich:
        task = rich.add_task(title, total=1, note="")

        def progress(done: int, total: int, note: str) -> None:
            rich.update(task, completed=done, total=total, note=note)

        yield progress


def _lines(title: str) -> Progress:
    begun = last = time.monotonic()

    def progress(done: int, total: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done == total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            print(f"{title:<24} {done}/{total}  {now - begun:.0f} s  {note}", file=sys.stderr, flush=True)

    return progress

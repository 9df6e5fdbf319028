"""The diagnosis as aligned text."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from unlearn_kernels._backends import BACKENDS
from unlearn_kernels._diagnose import healthy
from unlearn_kernels._selfcheck import PASSED


def render(report: Mapping[str, Any]) -> str:
    """The report of `_diagnose.collect` for a terminal; no line depends on its width."""
    sections = {
        "versions": _pairs(report["versions"]),
        "CUDA": _pairs(report["cuda"]),
        "build": _pairs(_build(report["build"])),
        "extensions": _pairs(report["extensions"]),
        "CPU": _pairs(report["cpu"]),
        "operators": _operators(report["operators"]),
        "environment": _pairs(_environment(report["environment"])),
        "self-check": _self_check(report),
    }
    return "\n\n".join(
        f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items()
    )


def _text(value: object) -> str:
    if value is None or value == "":
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _pairs(values: Mapping[str, Any]) -> Iterable[str]:
    return _columns((name, _text(value)) for name, value in values.items())


def _build(record: Mapping[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {"record": "none: nothing was built in this folder"}
    host = {f"host {name}": value for name, value in record.get("host", {}).items() if name != "isa"}
    return {name: value for name, value in record.items() if name != "host"} | host


def _environment(variables: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: f"{_text(v['value'])}{'' if v['set'] else ' (default)'}" for name, v in variables.items()}


def _operators(table: Mapping[str, Mapping[str, Mapping[str, str | None]]]) -> Iterator[str]:
    """A grid of yes and no, then the reason of each no, once."""
    reasons: dict[str, int] = {}

    def mark(cell: Mapping[str, str | None]) -> str:
        note = "; ".join(text for text in (cell["problem"], cell["hardware"]) if text)
        number = reasons.setdefault(note, len(reasons) + 1) if note else None
        return ("no" if cell["problem"] else "yes") + (f" [{number}]" if number else "")

    rows = [("operator", *BACKENDS)]
    rows += [(name, *(mark(cells[backend]) for backend in BACKENDS)) for name, cells in table.items()]
    yield from _columns(rows)
    yield from (f"[{number}] {note}" for note, number in reasons.items())


def _self_check(report: Mapping[str, Any]) -> Iterator[str]:
    for name, outcomes in report["self_check"].items():
        yield from (f"{name} ({backend}): {o}" for backend, o in outcomes.items() if o != PASSED)
    passed = [o for outcomes in report["self_check"].values() for o in outcomes.values()].count(PASSED)
    yield (
        f"{passed} checks passed against the float64 reference"
        if healthy(report)
        else f"FAILED ({passed} passed)"
    )

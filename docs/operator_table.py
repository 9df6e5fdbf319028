"""Writes the README's operator table from the registry: `python docs/operator_table.py [--write]`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from unlearn_kernels import _diagnose
from unlearn_kernels._backends import REGISTRY, Operator

README: Final = Path(__file__).parents[1] / "README.md"
BEGIN: Final = "<!-- operators:begin -->\n"
END: Final = "<!-- operators:end -->"


def table() -> str:
    """The table in Markdown, one row an operator, in the order of the families."""
    head = ("family", "operator", "formula", "cpp", "triton", "cuda", "gradient")
    rows = sorted((_row(operator) for operator in REGISTRY.values()), key=lambda row: row[0])
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows))


def _row(operator: Operator) -> tuple[str, ...]:
    gradient = "yes" if operator.differentiable else "–"
    formula = operator.formula.replace("|", r"\|")
    return operator.family, f"`{operator.name}`", f"`{formula}`", *_cells(operator), gradient


def _cells(operator: Operator) -> Iterator[str]:
    runs = _diagnose.gpu_runs()
    for backend in ("cpp", "triton", "cuda"):
        if backend not in operator.impls:
            yield "–"
        elif backend == "cpp":
            yield "yes"
        else:
            yield runs.get((operator.name, backend), _diagnose.NEVER_RUN)


def current() -> str:
    """The table that the README has now."""
    return README.read_text().split(BEGIN)[1].split(END)[0]


def write() -> None:
    """Replace the README's table."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print(table(), end="")

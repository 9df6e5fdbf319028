"""The audit as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = {
    "error": "distance",
    "best_length_error": "at best length",
    "gradient_left": "gradient left",
    "residual": "residual",
    "test_deviation": "test deviation",
    "forget_loss": "forget loss",
    "accuracy": "accuracy",
}
NOTE = (
    "distance: from the retrained parameters, doing nothing is 1; at best length: the same with the step's length\n"
    "chosen afterwards, for its direction alone; gradient left: of the rows that stay, at the start 1; residual: as\n"
    "reported by the step; test deviation: the largest difference of a probability from the retrained model's."
)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A block for every removal, a line for every step."""
    lines: list[str] = []
    for row in rows:
        if row["step"] == "nothing":
            lines += [
                "",
                f"{row['data']}: {row['rows']} rows removed ({row['removed']}); retrained: forget loss "
                f"{row['forget_loss_retrained']:.4f}, accuracy {row['accuracy_retrained']:.4f}",
                f"  {'':<21}" + "".join(f"{title:>16}" for title in COLUMNS.values()),
            ]
        lines.append(f"  {row['step']:<21}" + "".join(f"{row[name]:>16.3g}" for name in COLUMNS))
    return "\n".join([*lines[1:], "", NOTE])

"""Audit removals on convex models: every update beside training without the rows, doing nothing, and a known flaw.

    python examples/audit_removal.py

L2 logistic regression on scikit-learn's digits (1797 x 64, 10 classes) and breast-cancer data (569 x 30, 2 classes),
trained to the optimum in float64. Some rows are taken away: at random, half of one class, or those with the largest
influence on a test row. scikit-learn trains anew without them; each step is judged by its distance from that model,
with doing nothing at 1, by the gradient that is left on the rows that stay, and by what it says about removed and test
rows. `docs/influence.md` has a table of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from removals.logistic import Logistic, load
from removals.report import table
from removals.steps import STEPS, Removal, audit
from torch import Tensor

DATA = ("digits", "breast_cancer")
REMOVALS = ("random", "half of a class", "influential")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", choices=DATA, nargs="*", default=DATA, help="which (default: both)")
    parser.add_argument("--decay", type=float, default=1.0, help="L2 penalty, as 1 / C of scikit-learn")
    parser.add_argument("--rows", type=int, default=20, help="how many to remove (default: 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of random removals")
    parser.add_argument("--out", type=Path, help="file for the report as JSON")
    return parser.parse_args(argv)


def removed(model: Logistic, which: str, count: int, seed: int) -> Tensor:
    """Rows of the training set, by the way in which they are chosen."""
    if which == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(model.x), generator=generator)[:count]
    if which == "half of a class":
        members = (model.y == 1).nonzero().flatten()
        return members[: len(members) // 2]
    return model.influential(count)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in options.data:
        model = Logistic(*load(name, options.seed), options.decay)
        for which in REMOVALS:
            removal = Removal(model, removed(model, which, options.rows, options.seed))
            for step in STEPS:
                row = {"data": name, "removed": which, "rows": len(removal.forget), "step": step}
                found.append(row | audit(removal, step))
    return found


def main() -> int:
    options = arguments()
    torch.set_default_dtype(torch.float64)
    found = run(options)
    print(table(found))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

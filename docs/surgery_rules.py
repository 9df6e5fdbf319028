"""Draws what every rule makes of two gradients in two dimensions.

    python docs/surgery_rules.py

Replaces `docs/surgery_rules.svg` and `docs/surgery_conflict.svg`. Needs Matplotlib.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules

FOLDER: Final = Path(__file__).parent
FORGET, RETAIN = (-0.4, 0.75), (1.4, 0.1)
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "gru": {"cosine_clip": 0.3},
    "blur": {"gamma": 0.6},
    "constant": {"values": (0.3, 1.0)},
}
NOTES: Final = {
    "agem": "f leaves r's other side",
    "gru": "the same, at most 0.3 |f|",
    "blur": "γ f, and r orthogonal to f",
    "ngdiff": "f to be raised: unit r − unit f",
    "munba": "equal gain of both",
    "pcgrad": "both projected, added",
    "gradvac": "cosines raised to 0.1, added",
    "mgda": "shortest of the hull",
    "cagrad": "best for the worst near the mean",
    "imtl_g": "equal projections, in the hull",
    "aligned_mtl": "principal axes made equal",
    "nash_mtl": "equal gain, length 1",
    "upgrad": "each to the cone, mean",
    "dualproj": "the mean to the cone",
    "config": "equal cosines",
    "mean": "",
    "sum": "",
    "constant": "0.3 f + r",
}


# What `project_conflict_` alone knows: the rule, its options, a note.
IN_PLACE: Final[dict[str, tuple[str, dict[str, Any], str]]] = {
    "doco": ("doco", {}, "f leaves r's other side"),
    "doco, as published": ("doco", {"compat": True}, "without the factor |f|"),
    "gdr_gma": ("gdr_gma", {}, "both projected, half and half"),
    "gdr_gma, as published": ("gdr_gma", {"compat": True}, "f along the new r"),
    "sago": ("sago", {}, "r's numbers where signs differ"),
    "graddrop": ("graddrop", {"seed": 2}, "a sign by chance, each number"),
}


def weights(name: str, G: Tensor) -> Tensor:
    """The rule's weights; those with a memory aim at cosines of 0.1."""
    rule = rules.make_rule(name, **OPTIONS.get(name, {}))
    if isinstance(rule, rules.GradVac):
        rule.targets = torch.full((2, 2), 0.1, dtype=torch.float64)
    return surgery.weights(G, rule)


def by_weights(name: str) -> Tensor:
    """What a rule's weights make of both gradients."""
    J = torch.tensor([FORGET, RETAIN], dtype=torch.float64)
    return weights(name, J @ J.T) @ J


def in_place(name: str) -> Tensor:
    """What `project_conflict_` makes of the forget gradient."""
    rule, options, _ = IN_PLACE[name]
    forget, retain = (torch.tensor(x, dtype=torch.float64) for x in (FORGET, RETAIN))
    surgery.project_conflict_([forget], [retain], rule=rule, **options)
    return forget


def panel(axes: Any, name: str, g: Tensor, note: str) -> None:
    """Both gradients, their hull dotted, the result, and shaded the cone that works against neither."""
    J = torch.tensor([FORGET, RETAIN], dtype=torch.float64)
    corners = torch.linalg.inv(J) * torch.tensor([3.0, 3.0], dtype=torch.float64)
    cone = torch.cat([torch.zeros(1, 2, dtype=torch.float64), corners.T])
    axes.fill(cone[:, 0], cone[:, 1], color="0.93", zorder=0)
    axes.plot(*J.T, color="0.6", linewidth=0.6, linestyle=":", zorder=1)
    for vector, colour, label in ((J[0], "tab:red", "f"), (J[1], "tab:blue", "r"), (g, "black", "g")):
        x, y = vector.tolist()
        style = {"color": colour, "width": 0.02, "head_width": 0.1, "length_includes_head": True}
        axes.arrow(0, 0, x, y, zorder=3 if label == "g" else 2, linewidth=0, **style)
        axes.text(x + 0.08 * (x > 0) - 0.14 * (x < 0), y + 0.05, label, color=colour, fontsize=8)
    axes.set_title(name, fontsize=9, pad=2)
    axes.text(0.5, -0.02, note, transform=axes.transAxes, ha="center", va="top", fontsize=6.5)
    axes.set(xlim=(-0.75, 1.75), ylim=(-0.85, 1.5), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_visible(False)


def draw(picture: str, rows: int, results: Mapping[str, tuple[Tensor, str]]) -> None:
    """A panel for each of `results` by name: the vector and a note."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "rules", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, grid = plt.subplots(rows, 6, figsize=(9.5, 5.0 * rows / 3), layout="constrained")
    for axes, (name, (g, note)) in zip(grid.flat, results.items(), strict=True):
        panel(axes, name, g, note)
    figure.savefig(FOLDER / f"{picture}.svg", metadata={"Date": None})


def main() -> None:
    draw("surgery_rules", 3, {name: (by_weights(name), NOTES[name]) for name in rules.RULES})
    draw("surgery_conflict", 1, {name: (in_place(name), kind[-1]) for name, kind in IN_PLACE.items()})


if __name__ == "__main__":
    main()

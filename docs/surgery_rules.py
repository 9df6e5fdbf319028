"""Draws what every rule makes of two gradients in two dimensions.

    python docs/surgery_rules.py

Replaces `docs/surgery_rules.svg`. Needs Matplotlib.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules

PICTURE: Final = Path(__file__).with_suffix(".svg")
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


def weights(name: str, G: Tensor) -> Tensor:
    """The rule's weights; those with a memory aim at cosines of 0.1."""
    rule = rules.make_rule(name, **OPTIONS.get(name, {}))
    if isinstance(rule, rules.GradVac):
        rule.targets = torch.full((2, 2), 0.1, dtype=torch.float64)
    return surgery.weights(G, rule)


def panel(axes: Any, name: str) -> None:
    """Both gradients, their hull dotted, the result, and shaded the cone that works against neither."""
    J = torch.tensor([FORGET, RETAIN], dtype=torch.float64)
    g = weights(name, J @ J.T) @ J
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
    axes.text(0.5, -0.02, NOTES[name], transform=axes.transAxes, ha="center", va="top", fontsize=6.5)
    axes.set(xlim=(-0.75, 1.75), ylim=(-0.85, 1.5), xticks=[], yticks=[], aspect="equal")
    for side in axes.spines.values():
        side.set_visible(False)


def main() -> None:
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "rules", "svg.fonttype": "none", "font.family": "sans-serif"})
    figure, grid = plt.subplots(3, 6, figsize=(9.5, 5.0), layout="constrained")
    for axes, name in zip(grid.flat, rules.RULES, strict=True):
        panel(axes, name)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()

"""What the job showed: numbers for `report.json`, a table for the terminal, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from forget.report import table

from .drawing import COLOURS, SHAPES, contact_sheet
from .forgetting import Measured, Recipe


def fields(
    recipe: Recipe,
    judged: Mapping[str, Measured],
    steps: Mapping[str, Sequence[Mapping[str, float]]],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """For `report.json`: what was drawn before and after, and every step of every way."""
    drawn = {
        name: {
            "target": m.shapes[recipe.target],
            "others": m.others(recipe.target),
            "shapes": m.shapes,
            "colour": m.colour,
            "retain_loss": m.retain_loss,
        }
        for name, m in judged.items()
    }
    return {
        "recipe": asdict(recipe),
        "drawn": drawn,
        "steps": {way: list(seen) for way, seen in steps.items()},
        "seconds_forgetting": dict(seconds),
        "checks": _checks(drawn),
    }


def _checks(drawn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the job is meant to show, with what it did show; nothing here is assumed."""
    before, doco, plain = (drawn[name] for name in ("before", "doco", "forget only"))
    entries = [
        ("target's accuracy, down by", before["target"] - doco["target"], 0.5),
        ("others' accuracy, doco less forget only", doco["others"] - plain["others"], 0.0),
        ("others' retain loss, forget only less doco", plain["retain_loss"] - doco["retain_loss"], 0.0),
    ]
    return [
        {"what": what, "value": value, "target": f">= {limit:g}", "met": value >= limit}
        for what, value, limit in entries
    ]


def summary(report: Mapping[str, Any]) -> str:
    """The report for the terminal."""
    drawn, target = report["drawn"], report["recipe"]["target"]
    names = list(drawn)
    rows = [["accuracy of what is drawn", *names]]
    rows.append([f"{target} (forgotten)", *(f"{drawn[n]['target']:.2f}" for n in names)])
    for shape in SHAPES:
        if shape != target:
            rows.append([shape, *(f"{drawn[n]['shapes'][shape]:.2f}" for n in names)])
    rows.append(["all others", *(f"{drawn[n]['others']:.3f}" for n in names)])
    rows.append(["colours", *(f"{drawn[n]['colour']:.2f}" for n in names)])
    rows.append(["denoising loss of the others", *(f"{drawn[n]['retain_loss']:.4f}" for n in names)])
    conflict = [["conflict of forget and retain gradients", *report["steps"]]]
    for field, label in (("cosine", "mean cosine"), ("conflict_rate", "tensors in conflict")):
        means = []
        for seen in report["steps"].values():
            values = [step[field] for step in seen if field in step]
            means.append(f"{sum(values) / len(values):+.3f}")
        conflict.append([label, *means])
    shown = [["shown", "value", "target", ""]]
    shown += [
        [c["what"], f"{c['value']:+.4f}", c["target"], "met" if c["met"] else "NOT MET"]
        for c in report["checks"]
    ]
    return "\n\n".join(table(part) for part in (rows, conflict, shown))


def plot(report: Mapping[str, Any], judged: Mapping[str, Measured], path: Path) -> None:
    """The same prompts and noise before and after, a column of pictures a way, and the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 7), constrained_layout=True)
    above, below = figure.subfigures(2, 1)
    axes = above.subplots(1, len(judged))
    for axis, (name, measured) in zip(axes, judged.items(), strict=True):
        columns = len(measured.pictures) // (len(SHAPES) * len(COLOURS)) * len(COLOURS)
        shown = min(columns, len(SHAPES))
        rows = measured.pictures.view(len(SHAPES), columns, *measured.pictures.shape[1:])
        stride = columns // shown
        axis.imshow(contact_sheet(rows[:, ::stride][:, :shown].flatten(0, 1), shown).numpy())
        axis.set(title=name, xticks=[])
        size = measured.pictures.shape[-1]
        axis.set_yticks([size * (i + 0.5) for i in range(len(SHAPES))], SHAPES)
    bars, curve = below.subplots(1, 2)
    width = 0.8 / len(judged)
    for k, (name, measured) in enumerate(judged.items()):
        at = [i + (k - (len(judged) - 1) / 2) * width for i in range(len(SHAPES))]
        bars.bar(at, [measured.shapes[shape] for shape in SHAPES], width, label=name)
    bars.set_xticks(range(len(SHAPES)), SHAPES)
    bars.set(title="Accuracy of what is drawn", ylim=(-0.15, 1.05))
    for way, seen in report["steps"].items():
        points = [(i, step["retain"]) for i, step in enumerate(seen) if "retain" in step]
        curve.plot(*zip(*points, strict=True), label=way)
    curve.set(title="Retain loss of the batches", xlabel="step")
    bars.legend(fontsize=8, ncols=len(judged), loc="lower center", framealpha=1.0)
    curve.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)

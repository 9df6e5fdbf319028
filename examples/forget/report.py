"""What the job showed: numbers for `report.json`, a table for the terminal, a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .comparison import TEXTS_FOR_PRECISION, Outcome
from .corpus import Split

MEGABYTE = 1 << 20


def relative_change(outcome: Outcome, texts: str) -> float:
    return outcome.nll["after"][texts] / outcome.nll["before"][texts] - 1


def deviation(a: Outcome, b: Outcome, start: Tensor, steps: int) -> dict[str, float]:
    """Largest differences of two runs in the first `steps`; weights relative to the way that `b` went."""
    pairs = list(zip(a.steps[:steps], b.steps[:steps], strict=True))
    return {
        "steps": steps,
        "npo_relative": max(abs(x.npo - y.npo) / abs(y.npo) for x, y in pairs),
        "retain_nll_relative": max(abs(x.retain_nll - y.retain_nll) / abs(y.retain_nll) for x, y in pairs),
        "cosine": max(abs(x.cosine - y.cosine) for x, y in pairs),
        "weights_relative": float(
            (a.weights[steps] - b.weights[steps]).norm() / (b.weights[steps] - start).norm()
        ),
    }


def influence(outcome: Outcome, split: Split, size: int) -> dict[str, float]:
    """Precision of the first 50 texts found, and precision and recall of the first `size`."""
    truth = set(split.forget)
    first, hits = outcome.found[:TEXTS_FOR_PRECISION], len(truth.intersection(outcome.found[:size]))
    return {
        "precision_at_50": len(truth.intersection(first)) / len(first),
        "precision": hits / size,
        "recall": hits / len(truth),
    }


def run_fields(outcome: Outcome, split: Split, size: int) -> dict[str, Any]:
    """One run, for `report.json`."""
    angles = [math.degrees(math.acos(max(-1.0, min(1.0, step.cosine)))) for step in outcome.steps]
    return {
        "influence": influence(outcome, split, size),
        "nll": outcome.nll,
        "forget_nats": outcome.nll["after"]["forget"] - outcome.nll["before"]["forget"],
        "retain_relative": relative_change(outcome, "validation"),
        "steps": [asdict(step) | {"angle": angle} for step, angle in zip(outcome.steps, angles, strict=True)],
        "curve": outcome.curve,
        "seconds": dict(outcome.seconds) | {"total": sum(outcome.seconds.values())},
        "peak_extra_bytes": outcome.extra_bytes,
    }


def comparison_fields(
    outcomes: Mapping[str, Outcome], split: Split, texts: Sequence[int], start: Tensor
) -> dict[str, Any]:
    """The runs, how far they are from each other, and how far each is from float64."""
    kernels, plain, exact = outcomes["kernels"], outcomes["plain"], outcomes["float64"]
    steps, early = len(plain.steps), len(exact.steps)
    return {
        "forgotten_texts": list(texts),
        "runs": {name: run_fields(outcomes[name], split, len(texts)) for name in ("kernels", "plain")},
        "same_texts_found": kernels.found == plain.found,
        "deviation": {
            "kernels_to_plain": deviation(kernels, plain, start, steps),
            "kernels_to_float64": deviation(kernels, exact, start, early),
            "plain_to_float64": deviation(plain, exact, start, early),
        },
    }


def checks(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the job is meant to show, with what it did show; nothing here is assumed."""
    kernels, plain = report["runs"]["kernels"], report["runs"]["plain"]
    seconds = kernels["seconds"]["total"] / plain["seconds"]["total"]
    memory = max(kernels["peak_extra_bytes"].values()) / max(plain["peak_extra_bytes"].values())
    entries = [
        ("forget NLL up, nats per token", kernels["forget_nats"], ">=", 1.0),
        ("held-out retain NLL worse by, %", 100 * kernels["retain_relative"], "<=", 5.0),
        ("influence precision at 50", kernels["influence"]["precision_at_50"], ">=", 0.8),
        ("time with the kernels / plain", seconds, "<", 1.0),
        ("peak memory with the kernels / plain", memory, "<", 1.0),
    ]
    noise = {
        name: report["deviation"][f"{name}_to_float64"]["weights_relative"] for name in ("kernels", "plain")
    }
    entries.append(("distance to float64, kernels / plain", noise["kernels"] / noise["plain"], "<=", 2.0))
    compare = {">=": float.__ge__, "<=": float.__le__, "<": float.__lt__}
    return [
        {
            "what": what,
            "value": value,
            "target": f"{sign} {limit:g}",
            "met": compare[sign](float(value), limit),
        }
        for what, value, sign, limit in entries
    ]


def table(rows: list[list[str]]) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


_TEXTS = {
    "forget": "{module}, trained on",
    "queries": "{module}, held out",
    "retain": "the rest, trained on",
    "validation": "the rest, held out",
}


def summary(report: Mapping[str, Any]) -> str:
    """The report for the terminal."""
    runs, module = report["runs"], report["module"]
    names = list(runs)
    before = runs[names[0]]["nll"]["before"]
    likelihood = [["NLL per token", "before", *names]]
    for texts, label in _TEXTS.items():
        after = [f"{runs[name]['nll']['after'][texts]:.3f}" for name in names]
        likelihood.append([label.format(module=module), f"{before[texts]:.3f}", *after])
    found = [["influence", *names]]
    for field, label in (
        ("precision_at_50", "precision at 50"),
        ("precision", "precision of the forget set"),
        ("recall", "its recall"),
    ):
        found.append([label, *(f"{runs[name]['influence'][field]:.2f}" for name in names)])
    cost = [["cost", *names]]
    for phase in ("influence", "unlearning"):
        cost.append([f"{phase}, seconds", *(f"{runs[name]['seconds'][phase]:.1f}" for name in names)])
        cost.append(
            [
                f"{phase}, peak extra MB",
                *(f"{runs[name]['peak_extra_bytes'][phase] / MEGABYTE:.0f}" for name in names),
            ]
        )
    met = [["shown", "value", "target", ""]]
    met += [
        [c["what"], f"{c['value']:.3f}", c["target"], "met" if c["met"] else "NOT MET"]
        for c in report["checks"]
    ]
    parts = [likelihood, found, _conflict_rows(runs), cost, _deviation_rows(report["deviation"]), met]
    return "\n\n".join(table(part) for part in parts)


def _conflict_rows(runs: Mapping[str, Any]) -> list[list[str]]:
    rows = [["conflict of forget and retain gradients", *runs]]
    angles = [[step["angle"] for step in run["steps"]] for run in runs.values()]
    rows.append(["steps above 90 degrees", *(f"{sum(a > 90 for a in each)}/{len(each)}" for each in angles)])
    rows.append(["mean angle", *(f"{sum(each) / len(each):.1f}" for each in angles)])
    rows.append(["largest angle", *(f"{max(each):.1f}" for each in angles)])
    return rows


def _deviation_rows(deviation: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [
            "largest deviation",
            *(f"{pair.replace('_', ' ')}, {seen['steps']} steps" for pair, seen in deviation.items()),
        ]
    ]
    for field in ("npo_relative", "retain_nll_relative", "cosine", "weights_relative"):
        rows.append([field.replace("_", " "), *(f"{column[field]:.1e}" for column in deviation.values())])
    return rows


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Held-out likelihoods and conflict angles over the steps; seconds and memory per phase."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
    styles = {"kernels": {"color": "C0"}, "plain": {"color": "C1", "linestyle": "--"}}
    for name, run in report["runs"].items():
        points = [
            {"step": 0, **run["nll"]["before"]},
            *run["curve"],
            {"step": len(run["steps"]), **run["nll"]["after"]},
        ]
        for texts, marker in (("queries", "o"), ("validation", "s")):
            label = f"{_TEXTS[texts].format(module=report['module'])} ({name})"
            axes[0, 0].plot(
                [p["step"] for p in points],
                [p[texts] for p in points],
                marker=marker,
                label=label,
                **styles[name],
            )
        axes[0, 1].plot([step["angle"] for step in run["steps"]], label=name, **styles[name])
    axes[0, 0].set(title="Negative log-likelihood", xlabel="unlearning step", ylabel="nats per token")
    axes[0, 1].axhline(90, color="grey", linewidth=0.8)
    axes[0, 1].set(title="Angle of forget and retain gradients", xlabel="unlearning step", ylabel="degrees")
    for axis, field, scale, title, unit in (
        (axes[1, 0], "seconds", 1, "Time", "seconds"),
        (axes[1, 1], "peak_extra_bytes", MEGABYTE, "Peak extra memory", "MB"),
    ):
        for shift, (name, run) in zip((-0.2, 0.2), report["runs"].items(), strict=True):
            heights = [run[field][phase] / scale for phase in ("influence", "unlearning")]
            axis.bar_label(
                axis.bar(
                    [i + shift for i in range(2)], heights, 0.4, label=name, color=styles[name]["color"]
                ),
                fmt="%.3g",
            )
        axis.set_xticks(range(2), ["influence", "unlearning"])
        axis.set(title=title, ylabel=unit)
    for axis in axes.flat:
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)

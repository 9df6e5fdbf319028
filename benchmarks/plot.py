"""A result file as a picture: a panel a case, a bar a provider, the floor as a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import Row

_COLORS = {"ours": "#1b7837", "plain": "#7f7f7f", "peer": "#2166ac"}
_PANELS_ACROSS = 3
_FEWEST_BARS = 4


def plot(rows: Sequence[Row], path: Path, heading: str) -> None:
    """Write the PNG. Panels have a logarithmic time axis; rows without a time are left out."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot: needs matplotlib, which is not installed") from error
    panels = _panels(rows)
    if not panels:
        raise ValueError("--plot: no row has a time")
    across = min(_PANELS_ACROSS, len(panels))
    down = -(-len(panels) // across)
    tallest = max(len(panel) for panel in panels)
    figure = Figure(figsize=(6.4 * across, (1.3 + 0.32 * tallest) * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flatten()
    for axis, panel in zip(axes, panels, strict=False):
        _draw(axis, panel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(heading, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _panels(rows: Sequence[Row]) -> list[list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.seconds:
            groups.setdefault(row.case, []).append(row)
    return list(groups.values())


def _draw(axis: Any, rows: Sequence[Row]) -> None:
    ordered = sorted(rows, key=lambda row: row.seconds or 0.0, reverse=True)
    times = [(row.seconds or 0.0) * 1e3 for row in ordered]
    axis.barh([row.provider for row in ordered], times, color=[_COLORS[row.role] for row in ordered])
    axis.set_ylim(-0.6, max(len(ordered), _FEWEST_BARS) - 0.4)
    axis.set_xscale("log")
    axis.set_xlim(_left_edge(ordered), max(times) * 12)
    for index, row in enumerate(ordered):
        axis.text(times[index] * 1.1, index, _label(row), va="center", fontsize=7)
    if ordered[0].floor_seconds:
        axis.axvline(ordered[0].floor_seconds * 1e3, color="black", linewidth=1, linestyle="--")
    threads = ordered[0].threads
    axis.set_title(
        f"{ordered[0].case}\n{ordered[0].shape}, {threads} thread{'s' * (threads > 1)}", fontsize=8
    )
    axis.set_xlabel("ms; dashed: floor", fontsize=7)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)


def _left_edge(rows: Sequence[Row]) -> float:
    shortest = min(min(row.seconds or 0.0, row.floor_seconds or float("inf")) for row in rows)
    return shortest * 1e3 * 0.5


def _label(row: Row) -> str:
    seconds = row.seconds or 0.0
    text = f"{seconds * 1e3:.3g} ms" if seconds < 10 else f"{seconds:.1f} s"
    return text if row.peak_bytes is None else f"{text}, +{row.peak_bytes / 1e6:.1f} MB"

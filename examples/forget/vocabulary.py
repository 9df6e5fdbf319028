"""Memory of an unlearning step over the vocabulary's size: with the kernels, and in ordinary PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from .memory import PeakMeter
from .model import GPT, Shape
from .operators import Kernels, Plain
from .progress import bar
from .unlearning import Recipe, Unlearner
from .worker import Backend, backend

MEGABYTE = 1e6


@dataclass(frozen=True)
class Sweep:
    """One model body under heads of several sizes, and batches of texts of one length."""

    vocabularies: tuple[int, ...] = (8192, 32_768, 131_072)
    texts: int = 8
    tokens: int = 64
    width: int = 128
    layers: int = 2

    def shape(self, vocabulary: int) -> Shape:
        return Shape(vocabulary, self.tokens, self.width, self.layers, heads=4)


def peak(sweep: Sweep, vocabulary: int, kernels: bool, device: str, chosen: Backend | None) -> int:
    """Most bytes held at once in one step, forget and retain batch, beyond those held before it."""
    meter = PeakMeter(device)
    with backend(chosen):
        for size in (256, vocabulary):  # the first loads code
            torch.manual_seed(0)
            model = GPT(sweep.shape(size)).to(device)
            texts = list(torch.randint(0, size, (2 * sweep.texts, sweep.tokens + 1)))
            unlearner = Unlearner(model, Kernels() if kernels else Plain(), Recipe())
            forget, retain = texts[: sweep.texts], texts[sweep.texts :]
            reference = torch.full((len(forget),), 100.0)
            meter.start()
            unlearner.step(forget, reference, retain)
    return meter.extra()


def measure(sweep: Sweep, device: str, chosen: Backend | None) -> dict[str, Any]:
    """The peaks of both sets of operators, each in a process of its own."""
    points: list[dict[str, int]] = [{"vocabulary": size} for size in sweep.vocabularies]
    with bar("memory over the vocabulary") as progress:
        for place, (name, kernels) in enumerate((("kernels", True), ("plain", False))):
            with get_context("spawn").Pool(1) as pool:
                for i, point in enumerate(points):
                    size = point["vocabulary"]
                    point[name] = pool.apply(peak, (sweep, size, kernels, device, chosen))
                    progress(place * len(points) + i + 1, 2 * len(points), "")
    for point in points:
        point["logits"] = 4 * sweep.texts * sweep.tokens * point["vocabulary"]
    return {"sweep": asdict(sweep), "points": points}


def lines(points: Sequence[dict[str, int]]) -> list[list[str]]:
    """Rows of a table; a unit is the batch's logits in float32."""
    rows = [["vocabulary", "kernels, MB", "plain, MB", "kernels, units", "plain, units", "plain / kernels"]]
    for p in points:
        kernels, plain, unit = p["kernels"], p["plain"], p["logits"]
        rows.append(
            [str(p["vocabulary"])]
            + [f"{x / MEGABYTE:.0f}" for x in (kernels, plain)]
            + [f"{x / unit:.2f}" for x in (kernels, plain)]
            + [f"{plain / max(kernels, 1):.1f}"]
        )
    return rows


def plot(points: Sequence[dict[str, int]], path: Path) -> None:
    """Peak extra memory of the step, in megabytes and in units of the logits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    sizes = [p["vocabulary"] for p in points]
    for name, style in (("kernels", {"color": "C0"}), ("plain", {"color": "C1", "linestyle": "--"})):
        axes[0].plot(sizes, [p[name] / MEGABYTE for p in points], marker="o", label=name, **style)
        axes[1].plot(sizes, [p[name] / p["logits"] for p in points], marker="o", label=name, **style)
    axes[0].set(title="Peak extra memory of an NPO step", ylabel="MB", yscale="log")
    axes[1].set(title="The same over B T V float32 numbers", ylabel="units", ylim=(0, None))
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size // 1024}k" for size in sizes])
        axis.set_xlabel("vocabulary")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)

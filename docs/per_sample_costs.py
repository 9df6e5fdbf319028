"""Measures the paths of `per_sample.linear.dots`, fits the model's constants and draws both.

    python docs/per_sample_costs.py [--write]

`--write` replaces `docs/per_sample_costs.svg`. Needs SciPy and Matplotlib. One thread;
the least of several runs.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import torch

from unlearn_kernels.per_sample import _costs, linear
from unlearn_kernels.testing import randn

PICTURE: Final = Path(__file__).with_suffix(".svg")
SHAPES: Final = (
    _costs.Sizes(16, 256, 4, 256, 768, 768, True),
    _costs.Sizes(16, 256, 4, 256, 768, 768, False),
    _costs.Sizes(8, 64, 8, 64, 768, 768, False),
    _costs.Sizes(32, 16, 32, 16, 768, 768, False),
    _costs.Sizes(64, 1, 64, 1, 1024, 1024, False),
    _costs.Sizes(4, 512, 2, 512, 256, 512, False),
    _costs.Sizes(32, 128, 8, 32, 128, 512, True),
    _costs.Sizes(4, 128, 4, 128, 2048, 512, False),
    _costs.Sizes(48, 32, 24, 64, 256, 256, False),
    _costs.Sizes(8, 32, 8, 32, 64, 1024, True),
)


class Sample(NamedTuple):
    """One path at one shape: what it does, and the seconds it took."""

    method: str
    sizes: _costs.Sizes
    work: _costs.Work
    seconds: float


def seconds(sizes: _costs.Sizes, method: str, runs: int = 5) -> float:
    """The least time of some runs."""
    sides = ((sizes.samples1, sizes.tokens1), (sizes.samples2, sizes.tokens2))
    tensors = [randn(*side, n, seed=n) for side in sides for n in (sizes.inputs, sizes.outputs)]
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        linear.dots(*tensors, summed=sizes.summed, method=method)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def samples() -> Iterator[Sample]:
    """Both paths at every shape."""
    for sizes in SHAPES:
        for method, work in (("tokens", _costs.tokens(sizes)), ("direct", _costs.direct(sizes))):
            yield Sample(method, sizes, work, seconds(sizes, method))


def fit(measured: list[Sample]) -> tuple[float, list[float]]:
    """Seconds of a multiply-add, and the other costs in multiply-adds: non-negative, least relative squares."""
    from scipy.optimize import nnls

    rows = torch.tensor([[*s.work] for s in measured], dtype=torch.float64)
    times = torch.tensor([s.seconds for s in measured], dtype=torch.float64)
    solution, _ = nnls((rows / times[:, None]).numpy(), torch.ones_like(times).numpy())
    return float(solution[0]), [float(x / solution[0]) for x in solution[1:]]


def draw(measured: list[Sample], second: float) -> None:
    """Predicted against measured milliseconds, with what `auto` takes filled."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    for method, colour in (("tokens", "tab:blue"), ("direct", "tab:orange")):
        for s in (s for s in measured if s.method == method):
            other = (_costs.tokens if method == "direct" else _costs.direct)(s.sizes)
            taken = s.work.cost <= other.cost
            face = colour if taken else "none"
            axes.scatter(1e3 * s.seconds, 1e3 * second * s.work.cost, edgecolors=colour, facecolors=face)
        axes.scatter([], [], color=colour, label=method)
    ends = [1e3 * f(s.seconds for s in measured) for f in (min, max)]
    axes.plot(ends, ends, color="grey", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    axes.legend(title="filled: what auto takes", frameon=False)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    torch.set_num_threads(1)
    measured = list(samples())
    second, costs = fit(measured)
    print(f"multiply-adds a second {1 / second:.3g}")
    for name, value, now in zip(
        ("COPIED", "TRANSPOSED", "HADAMARD"),
        costs,
        (_costs.COPIED, _costs.TRANSPOSED, _costs.HADAMARD),
        strict=True,
    ):
        print(f"{name} {value:.2f} (now {now})")
    for s in measured:
        print(
            f"{s.method:8} {1e3 * s.seconds:8.2f} ms, predicted {1e3 * second * s.work.cost:8.2f} {tuple(s.sizes)}"
        )
    if "--write" in sys.argv[1:]:
        draw(measured, second)


if __name__ == "__main__":
    main()

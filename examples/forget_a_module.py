"""Make a language model forget one module of Python's standard library, with the kernels and without.

A small GPT is trained on the docstrings of the standard library. Influence then finds the training texts
behind a few held-out texts of the module, and the model unlearns them: NPO with per-sample clipping, a retain
loss, and gradient surgery between the two. All of it is done twice from the same model, by `unlearn_kernels`
and by ordinary PyTorch. `docs/guides/forget_a_module.md` explains the steps and the report.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from forget import corpus, report, vocabulary
from forget.comparison import Plan, compare
from forget.corpus import Split, Text
from forget.model import Shape
from forget.preparation import Training, load, prepare
from forget.progress import bar
from forget.unlearning import Recipe
from forget.worker import Setup, backend

import unlearn_kernels

PROJECTED = 512  # coordinates of a projected gradient
OTHERS = 3000  # texts of other modules; a standard library has some seven thousand


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--module", default="turtle", help="top-level module to forget (default: turtle)")
    parser.add_argument("--steps", type=positive, default=40, help="unlearning steps (default: 40)")
    parser.add_argument(
        "--train-steps",
        type=positive,
        default=Training.steps,
        help=f"training steps (default: {Training.steps})",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--backend",
        choices=("reference", "cpp", "triton", "cuda"),
        help="backend of the kernels (default: the device's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the training and the order of batches (default: 0)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the model, report.json and the plot (default: out/forget_MODULE)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a tiny model and few steps: shows that it runs, and nothing else",
    )
    parser.add_argument(
        "--memory-over-vocabulary",
        action="store_true",
        help="only measure the memory of one step under vocabularies of 8k, 32k and 128k words; trains nothing",
    )
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Settings:
    shape: Shape
    training: Training
    plan: dict[str, Any]
    texts: int  # of other modules, at most


def settings(options: argparse.Namespace) -> Settings:
    plan = {"steps": options.steps, "found": 64, "seed": options.seed, "yardstick": min(5, options.steps)}
    if not options.quick:
        return Settings(Shape(), Training(steps=options.train_steps, seed=options.seed), plan, OTHERS)
    shape = Shape(vocabulary=1024, context=32, width=32, layers=1, heads=2)
    plan |= {"steps": 4, "yardstick": 2, "measure_every": 2}
    return Settings(shape, Training(steps=20, seed=options.seed), plan, texts=600)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine(device: str) -> dict[str, Any]:
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "unlearn_kernels": unlearn_kernels.__version__,
    }


def run(
    options: argparse.Namespace, chosen: Settings, texts: list[Text], split: Split, folder: Path
) -> dict[str, Any]:
    """Train, find, forget. Returns the report."""
    with backend(options.backend), bar("training") as progress:
        trained, reused = prepare(
            texts,
            split,
            chosen.shape,
            chosen.training,
            folder=folder,
            device=options.device,
            progress=progress,
        )
    state = load(trained)
    setup = Setup(True, trained, PROJECTED, Recipe(), options.seed, options.device, options.backend)
    plan = Plan(split, [len(sequence) for sequence in state.sequences], **chosen.plan)
    outcomes, forgotten = compare(setup, plan)
    result = {
        "module": options.module,
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": machine(options.device),
        "corpus": {"texts": len(texts), "characters": sum(len(text.content) for text in texts)}
        | {name: len(indices) for name, indices in asdict(split).items()},
        "model": asdict(chosen.shape),
        "training": asdict(chosen.training) | {"seconds": state.seconds, "reused": reused},
        "unlearning": asdict(setup.recipe) | {"steps": plan.steps},
        **report.comparison_fields(outcomes, split, forgotten, state.model().flat_weights()),
    }
    result["checks"] = report.checks(result)
    return result


def memory_over_vocabulary(options: argparse.Namespace) -> int:
    """Measure, print and plot the memory of a step over the vocabulary."""
    quick = vocabulary.Sweep((2048, 32_768), texts=4, width=32, layers=1)
    found = vocabulary.measure(
        quick if options.quick else vocabulary.Sweep(), options.device, options.backend
    )
    folder = options.out or Path("out") / "memory_over_vocabulary"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.json").write_text(
        json.dumps(found | {"machine": machine(options.device)}, indent=1) + "\n"
    )
    print(report.table(vocabulary.lines(found["points"])))
    print(f"\nWritten: {folder / 'memory.json'}")
    draw(lambda path: vocabulary.plot(found["points"], path), folder / "memory.png")
    return 0


def draw(plot: Callable[[Path], None], path: Path) -> None:
    """A plot, where matplotlib is."""
    try:
        plot(path)
    except ImportError:
        print("No plot: matplotlib is not installed")
    else:
        print(f"         {path}")


def main() -> int:
    begun, options = time.perf_counter(), arguments()
    if options.memory_over_vocabulary:
        return memory_over_vocabulary(options)
    chosen, texts = settings(options), corpus.collect()
    try:
        split = corpus.split(texts, options.module, seed=options.seed, most=chosen.texts)
    except ValueError as error:
        print(f"forget_a_module: {error}", file=sys.stderr)
        return 2
    folder = options.out or Path("out") / f"forget_{options.module}"
    result = run(options, chosen, texts, split, folder)
    result["seconds"] = time.perf_counter() - begun
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report.summary(result))
    print(f"\nWritten: {folder / 'report.json'}")
    draw(lambda path: report.plot(result, path), folder / "report.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Make a diffusion model forget one shape, with gradient surgery and without.

A small UNet of diffusers is trained here to draw coloured shapes from words. Then it forgets one: a discriminator
of predicted clean samples draws what the target's prompt makes to what the anchor's prompt made, in the keys and values
of cross-attention alone. This is done three times from the same model with the same draws: with the forget
gradient only, with a weighted sum of it and the retain gradient, and with DoCo's surgery between the two. A
classifier, trained here as well, judges the pictures. `docs/guides/forget_a_concept.md` explains the report.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from concepts import report
from concepts.drawing import SHAPES
from concepts.forgetting import WAYS, Measured, Recipe, forget, measure
from concepts.models import Classifier, Painter, new_painter, train_classifier, train_painter
from forget.progress import bar
from forget_a_module import machine, positive


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--target", choices=SHAPES, default="triangle", help="what to forget (default: triangle)"
    )
    parser.add_argument(
        "--anchor", choices=SHAPES, default="square", help="what shall come instead (default: square)"
    )
    parser.add_argument("--steps", type=positive, default=60, help="forgetting steps (default: 60)")
    parser.add_argument("--train-steps", type=positive, default=600, help="training steps (default: 600)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of all that is drawn: models, batches, noise (default: 0)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder for report.json and the pictures (default: out/forget_TARGET)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny models and few steps: shows that it runs, and nothing else"
    )
    return parser.parse_args(argv)


def trained(options: argparse.Namespace) -> tuple[Painter, Classifier, dict[str, float]]:
    """The painter, the judge of its pictures, and how good they are."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    steps, width, batch = (6, 8, 8) if options.quick else (options.train_steps, 32, 64)
    with bar("training the judge") as progress:
        judge, accuracy = train_classifier(20 if options.quick else 150, generator, progress)
    painter = new_painter(width)
    painter.unet.to(options.device)
    painter.text.to(options.device)
    with bar("training the painter") as progress:
        loss = train_painter(painter, steps, batch, generator, options.device, progress)
    painter.unet.requires_grad_(False)
    return painter, judge, {"judge_accuracy": accuracy, "painter_loss": loss}


def run(options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Measured]]:
    """Train, and forget in every way. Returns the report, and what was drawn before and after."""
    begun = time.perf_counter()
    painter, judge, training = trained(options)
    training["seconds"] = time.perf_counter() - begun
    recipe = Recipe(options.target, options.anchor, options.steps, warm_up=20)
    if options.quick:
        recipe = Recipe(options.target, options.anchor, 2, warm_up=1, batch=4, retain_batch=4)
    each = 1 if options.quick else 16
    judged = {"before": measure(painter, judge, each, options.target, options.seed, options.device)}
    steps, seconds = {}, {}
    for way in WAYS:
        begun = time.perf_counter()
        with bar(f"forgetting, {way}") as progress:
            changed, steps[way] = forget(painter, way, recipe, options.seed, options.device, progress)
        seconds[way] = time.perf_counter() - begun
        judged[way] = measure(changed, judge, each, options.target, options.seed, options.device)
    result = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": machine(options.device),
        "training": training,
        **report.fields(recipe, judged, steps, seconds),
    }
    return result, judged


def main() -> int:
    begun, options = time.perf_counter(), arguments()
    if options.target == options.anchor:
        print(
            f"forget_a_concept: target and anchor must differ, got {options.target!r} twice", file=sys.stderr
        )
        return 2
    folder = options.out or Path("out") / f"forget_{options.target}"
    folder.mkdir(parents=True, exist_ok=True)
    result, judged = run(options)
    result["seconds"] = time.perf_counter() - begun
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    print(report.summary(result))
    print(f"\nWritten: {folder / 'report.json'}")
    try:
        report.plot(result, judged, folder / "report.png")
    except ImportError:
        print("No plot: matplotlib is not installed")
    else:
        print(f"         {folder / 'report.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Forgetting a shape: DoCo's step, with surgery and without, from one painter and with the same draws."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from unlearn_adapters.diffusers import (
    DoCo,
    PatchDiscriminator,
    cross_attention_kv,
    denoising_target,
    train_only,
)
from unlearn_kernels.surgery import GradientSurgery, rules

from .drawing import SHAPES, Batch, draw_random, every_prompt
from .models import Classifier, Painter, Progress, judged, latents, paint

# What becomes of the forget and the retain gradient.
WAYS: Mapping[str, Any] = {
    "forget only": lambda: rules.Constant([1.0, 0.0]),
    "weighted sum": lambda: rules.Constant([1.0, 0.1]),
    "doco": lambda: "doco",
}


@dataclass(frozen=True)
class Recipe:
    """Of the forgetting; the same for all ways."""

    target: str
    anchor: str
    steps: int
    warm_up: int
    batch: int = 32
    retain_batch: int = 64
    learning_rate: float = 2e-3
    discriminator_rate: float = 1e-3
    retain_target: str = "noise"


@dataclass
class Measured:
    """What a painter draws: accuracy by shape, of colours, and the pictures that it was judged by."""

    shapes: dict[str, float]
    colour: float
    retain_loss: float
    pictures: Tensor

    def others(self, target: str) -> float:
        """The mean accuracy of all shapes but one."""
        kept = [value for name, value in self.shapes.items() if name != target]
        return sum(kept) / len(kept)


def measure(painter: Painter, judge: Classifier, each: int, target: str, seed: int, device: str) -> Measured:
    """Pictures for every prompt, judged; and the denoising loss of all shapes but one."""
    generator = Generator().manual_seed(seed)
    shapes, colours = every_prompt(each)
    pictures = paint(painter, shapes, colours, generator, device)
    seen, tints = judged(judge, pictures)
    right = {name: float((seen == i)[shapes == i].float().mean()) for i, name in enumerate(SHAPES)}
    kept = draw_random(256, generator, of=[i for i, name in enumerate(SHAPES) if name != target])
    return Measured(
        right,
        float((tints == colours).float().mean()),
        denoising_loss(painter, kept, generator, device),
        pictures,
    )


@torch.no_grad()
def denoising_loss(painter: Painter, drawn: Batch, generator: Generator, device: str) -> float:
    clean = latents(drawn.pictures)
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(1000, (len(clean),), generator=generator)
    clean, noise, timesteps = (x.to(device) for x in (clean, noise, timesteps))
    noisy = painter.scheduler.add_noise(clean, noise, timesteps)
    output = painter.unet(noisy, timesteps, painter.text(drawn.words.to(device))).sample
    return float(F.mse_loss(output, denoising_target(painter.scheduler, clean, noise, timesteps)))


def _method(painter: Painter, way: str, recipe: Recipe, frozen: Painter, seed: int, device: str) -> DoCo:
    torch.manual_seed(seed)
    discriminator = PatchDiscriminator(12, (64, 128)).to(device)
    parameters = list(cross_attention_kv(painter.unet).values())
    train_only(painter.unet, parameters)
    return DoCo(
        painter.unet,
        frozen.unet,
        painter.scheduler,
        torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0),
        discriminator,
        torch.optim.Adam(discriminator.parameters(), lr=recipe.discriminator_rate, betas=(0.5, 0.999)),
        GradientSurgery(parameters, WAYS[way](), scope="tensor"),
        warm_up=recipe.warm_up,
        retain_target=recipe.retain_target,
    )


def forget(
    before: Painter, way: str, recipe: Recipe, seed: int, device: str, progress: Progress
) -> tuple[Painter, list[dict[str, float]]]:
    """A painter that has forgotten, and the steps of it. Batches and noise depend on the seed alone."""
    painter = Painter(copy.deepcopy(before.unet), before.text, before.scheduler)
    method = _method(painter, way, recipe, before, seed, device)
    pictures, noise = Generator().manual_seed(seed), Generator(device).manual_seed(seed)
    target, anchor = SHAPES.index(recipe.target), SHAPES.index(recipe.anchor)
    others = [i for i in range(len(SHAPES)) if i != target]
    steps = []
    for step in range(recipe.warm_up + recipe.steps):
        instead = draw_random(recipe.batch, pictures, of=[anchor])
        wrong = Batch(instead.pictures, torch.full_like(instead.shapes, target), instead.colours)
        kept = draw_random(recipe.retain_batch, pictures, of=others)
        with torch.no_grad():
            prompts = [before.text(x.words.to(device)) for x in (wrong, instead, kept)]
        clean = [latents(x.pictures).to(device) for x in (instead, kept)]
        found = method.step(clean[0], prompts[0], prompts[1], (clean[1], prompts[2]), noise)
        seen = {"discriminator": float(found.discriminator)}
        if found.surgery is not None and found.forget is not None and found.retain is not None:
            G = found.surgery.gramian.reshape(-1, 2, 2)
            whole = G.sum(0)
            seen |= {
                "forget": float(found.forget),
                "retain": float(found.retain),
                "cosine": float(whole[0, 1] / (whole[0, 0] * whole[1, 1]).sqrt()),
                "conflict_rate": float((G[:, 0, 1] < 0).double().mean()),
            }
        steps.append(seen)
        note = f"L_D {seen['discriminator']:.2f}  L_G {seen.get('forget', float('nan')):.2f}"
        progress(step + 1, recipe.warm_up + recipe.steps, note)
    return painter, steps

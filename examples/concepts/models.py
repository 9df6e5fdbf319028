"""A small text-to-picture diffusion model, and a classifier that says what a picture shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from unlearn_adapters.diffusers import denoising_target

from .drawing import COLOURS, SHAPES, SIZE, WORDS, draw_random

Progress = Callable[[int, int, str], None]
WIDTH = 8  # of an embedded word: fewer than there are words, so that none can be told from all others by one direction


class TextEncoder(nn.Module):
    """A prompt as CLIP makes one: a token before and one after the words, which all prompts share, all having seen
    each other, (B, 4, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(len(WORDS) + 2, WIDTH), nn.Parameter(torch.zeros(4, WIDTH))
        self.mix = nn.TransformerEncoderLayer(WIDTH, 2, 4 * WIDTH, dropout=0.0, batch_first=True)

    def forward(self, words: Tensor) -> Tensor:
        begin, end = (torch.full_like(words[:, :1], len(WORDS) + i) for i in range(2))
        mixed: Tensor = self.mix(self.words(torch.cat([begin, words, end], 1)) + self.places)
        return mixed


class Classifier(nn.Module):
    """Logits for the shape and for the colour of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(32 * (SIZE // 4) ** 2, 64), nn.ReLU()),
        )
        self.shape, self.colour = nn.Linear(64, len(SHAPES)), nn.Linear(64, len(COLOURS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.body(pictures)
        return self.shape(seen), self.colour(seen)


@dataclass
class Painter:
    """What draws from words."""

    unet: UNet2DConditionModel
    text: TextEncoder
    scheduler: DDPMScheduler


def new_painter(width: int) -> Painter:
    """With random weights."""
    unet = UNet2DConditionModel(
        sample_size=SIZE // 2, in_channels=12, out_channels=12, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn", block_out_channels=(width, 2 * width),
        cross_attention_dim=WIDTH, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    # A velocity gives a predicted picture at every noise level, where noise is divided by nearly nothing.
    return Painter(unet, TextEncoder(), DDPMScheduler(prediction_type="v_prediction"))


def latents(pictures: Tensor) -> Tensor:
    """(B, 12, 8, 8): every 2 x 2 pixels at one place, in the stead of an autoencoder."""
    return F.pixel_unshuffle(pictures, 2)


def _cosine(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, optimizer.param_groups[0]["lr"], total_steps=steps, pct_start=0.1
    )


def train_painter(
    painter: Painter, steps: int, batch: int, generator: Generator, device: str, progress: Progress
) -> float:
    """Denoising, with the text encoder; returns the mean loss of the last tenth of the steps."""
    parameters = [*painter.unet.parameters(), *painter.text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    schedule, losses = _cosine(optimizer, steps), []
    for step in range(steps):
        drawn = draw_random(batch, generator)
        clean = latents(drawn.pictures)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(painter.scheduler.config.num_train_timesteps, (batch,), generator=generator)
        clean, noise, timesteps = (x.to(device) for x in (clean, noise, timesteps))
        noisy = painter.scheduler.add_noise(clean, noise, timesteps)
        output = painter.unet(noisy, timesteps, painter.text(drawn.words.to(device))).sample
        loss = F.mse_loss(output, denoising_target(painter.scheduler, clean, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        progress(step + 1, steps, f"loss {float(losses[-1]):.3f}" if step % 10 == 0 else "")
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


@torch.no_grad()
def paint(
    painter: Painter, shapes: Tensor, colours: Tensor, generator: Generator, device: str, steps: int = 15
) -> Tensor:
    """A picture for every pair of a shape and a colour, (B, 3, 16, 16); the generator alone decides on the noise."""
    scheduler = DDIMScheduler.from_config(
        painter.scheduler.config, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    words = torch.stack([colours, shapes + len(COLOURS)], 1).to(device)
    prompts = painter.text(words)
    x = torch.randn(len(shapes), 12, SIZE // 2, SIZE // 2, generator=generator).to(device)
    for t in scheduler.timesteps:
        x = scheduler.step(painter.unet(x, t, prompts).sample, t, x).prev_sample
    return F.pixel_shuffle(x, 2).cpu()


def train_classifier(steps: int, generator: Generator, progress: Progress) -> tuple[Classifier, float]:
    """On drawn pictures with some noise; returns it with its accuracy on fresh ones."""
    judge = Classifier()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3)
    schedule = _cosine(optimizer, steps)
    for step in range(steps):
        drawn = draw_random(128, generator)
        blurred = drawn.pictures + 0.1 * torch.randn(drawn.pictures.shape, generator=generator)
        shape, colour = judge(blurred)
        loss = F.cross_entropy(shape, drawn.shapes) + F.cross_entropy(colour, drawn.colours)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, "")
    fresh = draw_random(1000, generator)
    shapes, colours = judged(judge, fresh.pictures)
    return judge, float(((shapes == fresh.shapes) & (colours == fresh.colours)).float().mean())


@torch.no_grad()
def judged(judge: Classifier, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The shapes and the colours that it sees."""
    shape, colour = judge(pictures)
    return shape.argmax(1), colour.argmax(1)

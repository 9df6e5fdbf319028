"""Pictures of coloured shapes, drawn by formula, and the words for them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SIZE = 16  # pixels a side
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COLOURS = {"red": (1.0, 0.1, 0.1), "green": (0.1, 0.9, 0.2), "blue": (0.2, 0.3, 1.0)}
WORDS = (*COLOURS, *SHAPES)
_FINE = 3  # samples a pixel and side, for soft edges


@dataclass(frozen=True)
class Batch:
    """Pictures (B, 3, 16, 16) in [-1, 1], with the number of the shape and of the colour of each."""

    pictures: Tensor
    shapes: Tensor
    colours: Tensor

    @property
    def words(self) -> Tensor:
        """(B, 2): the colour's number in `WORDS`, and the shape's."""
        return torch.stack([self.colours, self.shapes + len(COLOURS)], 1)


def _insides(x: Tensor, y: Tensor) -> Tensor:
    """For every shape whether a point is inside, in units of its size, (shapes, ...)."""
    radius = torch.hypot(x, y)
    arm = 0.3
    inside = {
        "circle": radius < 0.95,
        "square": torch.maximum(x.abs(), y.abs()) < 0.8,
        "triangle": (y < 0.8) & (y > 2.0 * x.abs() - 1.0),
        "cross": (torch.minimum(x.abs(), y.abs()) < arm) & (torch.maximum(x.abs(), y.abs()) < 1.0),
        "ring": (radius < 1.0) & (radius > 0.6),
        "bar": (y.abs() < arm) & (x.abs() < 1.1),
    }
    return torch.stack([inside[name] for name in SHAPES])


def draw(shapes: Tensor, colours: Tensor, generator: Generator) -> Batch:
    """A picture for every pair of numbers, at a place and of a size that are random."""
    count = len(shapes)
    fine = SIZE * _FINE
    steps = (torch.arange(fine) + 0.5) / fine * 2 - 1
    size = 0.5 + 0.2 * torch.rand(count, 1, 1, generator=generator)
    x0, y0 = (0.2 * (2 * torch.rand(2, count, 1, 1, generator=generator) - 1)).unbind()
    inside = _insides((steps[None, None, :] - x0) / size, (steps[None, :, None] - y0) / size)
    chosen = inside[shapes, torch.arange(count)].float()
    soft = torch.nn.functional.avg_pool2d(chosen[:, None], _FINE)
    tints = torch.tensor(list(COLOURS.values()))[colours]
    return Batch(2 * soft * tints[:, :, None, None] - 1, shapes, colours)


def draw_random(count: int, generator: Generator, *, of: list[int] | None = None) -> Batch:
    """Pictures of random colours, and of random shapes among `of`."""
    known = torch.tensor(list(range(len(SHAPES))) if of is None else of)
    shapes = known[torch.randint(len(known), (count,), generator=generator)]
    return draw(shapes, torch.randint(len(COLOURS), (count,), generator=generator), generator)


def every_prompt(each: int) -> tuple[Tensor, Tensor]:
    """`each` times all pairs of a shape and a colour: shapes and colours."""
    shapes = torch.arange(len(SHAPES)).repeat_interleave(len(COLOURS) * each)
    colours = torch.arange(len(COLOURS)).repeat_interleave(each).repeat(len(SHAPES))
    return shapes, colours


def contact_sheet(pictures: Tensor, columns: int) -> Tensor:
    """Pictures (B, 3, S, S) in [-1, 1] side by side, (rows S, columns S, 3) in [0, 1]."""
    rows = math.ceil(len(pictures) / columns)
    grid = pictures.new_full((rows * columns, *pictures.shape[1:]), -1.0)
    grid[: len(pictures)] = pictures
    size = pictures.shape[-1]
    grid = grid.view(rows, columns, 3, size, size).permute(0, 3, 1, 4, 2)
    return ((grid.reshape(rows * size, columns * size, 3) + 1) / 2).clamp(0, 1)

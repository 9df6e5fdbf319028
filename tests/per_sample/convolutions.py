"""Convolutions that the tests go over, and their per-sample gradients by autograd in float64."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_kernels.testing import randn


class Layer(NamedTuple):
    """A layer and the spatial shape of its input."""

    channels: int
    outputs: int
    spatial: tuple[int, ...]
    arguments: dict[str, Any]

    def module(self) -> nn.Module:
        made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.spatial) - 1]
        return made(self.channels, self.outputs, **self.arguments, dtype=torch.float64)

    def pair(
        self, batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients."""
        a = randn(batch, self.channels, *self.spatial, dtype=dtype, seed=seed)
        with torch.no_grad():
            out = self.module()(torch.zeros(1, *a.shape[1:], dtype=torch.float64)).shape[1:]
        return a, randn(batch, *out, dtype=dtype, seed=seed + 1)


def layer(channels: int, outputs: int, spatial: tuple[int, ...], kernel_size: Any, **arguments: Any) -> Layer:
    return Layer(channels, outputs, spatial, {"kernel_size": kernel_size, **arguments})


LAYERS = {
    "one element": layer(1, 1, (1,), 1),
    "1d": layer(5, 7, (17,), 3, padding=2),
    "1d strided": layer(3, 4, (301,), 4, stride=3, dilation=2),
    "1d same, even kernel": layer(3, 4, (19,), 4, padding="same"),
    "2d": layer(8, 12, (9, 11), 3, padding=1),
    "2d past a block": layer(17, 35, (19, 31), 3, padding=1),
    "2d everything": layer(8, 12, (9, 11), (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
    "2d same": layer(6, 9, (8, 7), 5, padding="same", dilation=2),
    "2d padding beyond the input": layer(2, 5, (2, 3), 3, padding=3),
    "2d one position": layer(6, 9, (3, 3), 3),
    "2d pointwise": layer(11, 7, (5, 6), 1),
    "2d strided pointwise": layer(11, 7, (7, 6), 1, stride=2),
    "2d many tiles": layer(30, 200, (6, 5), 3, padding="valid"),
    "depthwise": layer(6, 6, (8, 20), 3, padding=1, groups=6),
    "depthwise, two outputs each": layer(5, 10, (19, 17), 3, stride=2, padding=1, groups=5),
    "three outputs": layer(20, 3, (9, 9), 3, padding=1),
    "many groups": layer(160, 160, (4, 4), 3, padding=1, groups=80),
    "3d": layer(
        4, 6, (5, 6, 7), (3, 2, 2), stride=(1, 2, 1), padding=(1, 1, 0), dilation=(2, 1, 1), groups=2
    ),
}


def by_autograd(layer: Layer, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: one backward a sample, (B, *weight) and (B, O)."""
    module = layer.module()
    parameters = list(module.parameters())
    pairs = [
        torch.autograd.grad(module(x[None]), parameters, upstream[None])
        for x, upstream in zip(a.double(), g.double(), strict=True)
    ]
    weights, biases = zip(*pairs, strict=True)
    return torch.stack(weights), torch.stack(biases)


def flat(gradients: tuple[Tensor, Tensor]) -> Tensor:
    """Gradients of weight and bias as rows."""
    return torch.cat([x.flatten(1) for x in gradients], 1)


def channels_last(x: Tensor) -> Tensor:
    """The same maps with channels side by side in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)

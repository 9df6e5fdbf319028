"""Small models, and their per-sample gradients by a loop over the samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]


def looped(model: nn.Module, samples: list[Any], loss: Loss) -> dict[str, Tensor]:
    """The gradients of every trainable parameter, (B, *shape), one forward and backward a sample."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    for sample in samples:
        found = torch.autograd.grad(loss(model, sample), list(named.values()), allow_unused=True)
        for (name, p), g in zip(named.items(), found, strict=True):
            rows[name].append(torch.zeros_like(p) if g is None else g)
    return {name: torch.stack(g).detach() for name, g in rows.items()}


def sqnorms(grads: dict[str, Tensor]) -> Tensor:
    return torch.stack([g.double().flatten(1).square().sum(1) for g in grads.values()]).sum(0)


def flattened(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], dim=1)


def clipped(grads: dict[str, Tensor], max_norm: float, mean: bool) -> dict[str, Tensor]:
    """The sum, or mean, of the clipped gradients."""
    w = (max_norm / sqnorms(grads).sqrt()).clamp(max=1.0)
    w = w / len(w) if mean else w
    return {name: torch.tensordot(w.to(g.dtype), g, 1) for name, g in grads.items()}


def half_square(model: nn.Module, sample: Any) -> Tensor:
    """The loss of one sample: nonlinear, so that output gradients differ by sample."""
    return model(sample).square().sum() / 2


class Text(nn.Module):
    """Tokens to vectors: embeddings, positions (1, T), a block with a 4-D linear layer, a head."""

    def __init__(self, tied: bool = False, padding_idx: int | None = None) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 8, padding_idx=padding_idx)
        self.places = nn.Embedding(9, 8)
        self.first = nn.LayerNorm(8)
        self.inner = nn.Linear(4, 6)
        self.outer = nn.Linear(12, 8, bias=False)
        self.last = nn.RMSNorm(8, eps=1e-6)
        self.head = nn.Linear(8, 13, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1], device=ids.device)[None]
        x = self.words(ids) + self.places(at)
        heads = self.first(x).unflatten(-1, (2, 4))
        x = x + self.outer(nn.functional.gelu(self.inner(heads)).flatten(-2))
        return self.head(self.last(x))


class Pictures(nn.Module):
    """Pictures to numbers: every kind of convolution and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
            nn.GroupNorm(2, 8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, (3, 2), stride=2, padding=(2, 1), dilation=(2, 1), groups=4, bias=False),
            nn.InstanceNorm2d(8, affine=True),
            nn.SiLU(),
            nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Conv2d(4, 4, 2, padding="same"),
        )
        self.line = nn.Conv1d(4, 5, 3, stride=2)
        self.cube = nn.Conv3d(1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return torch.cat([self.line(y.flatten(2)).flatten(1), self.cube(y[:, None]).flatten(1)], dim=1)


def text(B: int = 4, T: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 13, (B, T), generator=torch.Generator().manual_seed(seed))

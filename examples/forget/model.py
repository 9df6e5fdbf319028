"""A small GPT: pre-norm blocks, learned positions, head tied to the embedding, linear layers without bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    vocabulary: int = 8192
    context: int = 128
    width: int = 128
    layers: int = 3
    heads: int = 4


class Block(nn.Module):
    """Attention, then a perceptron, each on the normed input and added to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.width
        self.heads = shape.heads
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.up = nn.Linear(d, 4 * d, bias=False)
        self.down = nn.Linear(4 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, d]
        q, k, v = (
            self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # 3 x [B, H, T, d/H]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """`model(tokens)` is the hidden state that the head reads; the head is `model.head`, `(V, d)`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / ((2 * shape.layers) ** 0.5 if residual else 1.0))

    @property
    def head(self) -> Tensor:
        return self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, d]
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers of the blocks, by name: what unlearning may change."""
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def flat_weights(self) -> Tensor:
        """The weights of `linears`, in one vector."""
        return torch.cat(
            [layer.weight.detach().flatten().double().cpu() for layer in self.linears().values()]
        )


def pad(sequences: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Inputs and labels, both `(B, T)`. Padding comes last, so that causal attention needs no mask."""
    length = max(len(sequence) for sequence in sequences) - 1
    inputs = torch.zeros(len(sequences), length, dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORE)
    for row, sequence in enumerate(sequences):
        inputs[row, : len(sequence) - 1] = sequence[:-1]
        labels[row, : len(sequence) - 1] = sequence[1:]
    return inputs.to(device), labels.to(device)

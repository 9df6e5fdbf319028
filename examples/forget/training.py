"""Train the GPT, and measure likelihoods."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels.token_loss import linear_nll

from .model import GPT, IGNORE, pad

Progress = Callable[[int, int, str], None]


def batches_by_length(
    lengths: Sequence[int], tokens: int, generator: torch.Generator | None = None, *, most: int | None = None
) -> list[list[int]]:
    """Batches of texts of like length, each of at most `tokens` padded tokens and `most` texts.

    A generator shuffles them, and texts of about the same length among them.
    """
    keys = torch.tensor(lengths, dtype=torch.float64)
    if generator is not None:
        keys = keys * (1 + 0.1 * torch.rand(len(lengths), generator=generator, dtype=torch.float64))
    batches: list[list[int]] = []
    longest = 0
    for i in torch.argsort(keys, descending=True, stable=True).tolist():
        longest = max(longest, lengths[i])
        if not batches or (len(batches[-1]) + 1) * longest > tokens or len(batches[-1]) == most:
            batches.append([])
            longest = lengths[i]
        batches[-1].append(i)
    if generator is not None:
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
    return batches


def random_batches(count: int, size: int, generator: torch.Generator) -> list[list[int]]:
    """The numbers below `count` in a random order, `size` at a time; what is left over is left out."""
    order = torch.randperm(count, generator=generator).tolist()
    return [order[begin : begin + size] for begin in range(0, count - size + 1, size)]


def train(
    model: GPT,
    sequences: Sequence[Tensor],
    *,
    steps: int,
    tokens: int,
    rate: float,
    seed: int,
    progress: Progress,
) -> None:
    """AdamW, linear warm-up over 5 % of the steps, then a cosine to zero."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    plain = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))
    warmup = max(1, steps // 20)
    generator = torch.Generator().manual_seed(seed)
    device = model.head.device
    queue: list[list[int]] = []
    for step in range(steps):
        queue = queue or batches_by_length([len(s) for s in sequences], tokens, generator)
        inputs, labels = pad([sequences[i] for i in queue.pop()], device)
        scale = (
            (step + 1) / warmup
            if step < warmup
            else 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        loss = linear_nll(model(inputs), model.head, labels).sum() / (labels != IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(step + 1, steps, f"nll {loss.item():.2f}")


@torch.no_grad()
def nll_per_token(model: GPT, sequences: Sequence[Tensor], tokens: int = 2048) -> float:
    """Mean negative log-likelihood over all tokens of `sequences`, in nats; in plain PyTorch."""
    total, count = 0.0, 0
    for batch in batches_by_length([len(s) for s in sequences], tokens):
        inputs, labels = pad([sequences[i] for i in batch], model.head.device)
        logits = (model(inputs) @ model.head.T).flatten(0, 1)
        total += F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum").item()
        count += int((labels != IGNORE).sum())
    return total / count

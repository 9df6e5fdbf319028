"""The tokenized corpus and the trained model, kept in a file for as long as it fits."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .corpus import Split, Text, encode, train_tokenizer
from .model import GPT, Shape
from .training import Progress, train


@dataclass(frozen=True)
class Training:
    """How to train."""

    steps: int = 500
    tokens: int = 1024  # a batch
    rate: float = 4e-3
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A trained model and the corpus as it reads it."""

    shape: Shape
    weights: dict[str, Tensor]
    sequences: list[Tensor]
    seconds: float  # that training took when it was done

    def model(self) -> GPT:
        model = GPT(self.shape)
        model.load_state_dict(self.weights)
        return model


def key(texts: list[Text], split: Split, shape: Shape, training: Training, device: str) -> str:
    """A short hash of all that a trained model depends on."""
    parts: list[Any] = [
        asdict(shape),
        asdict(training),
        torch.device(device).type,
        torch.__version__,
        split.train,
    ]
    parts.append([text.content for text in texts])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def prepare(
    texts: list[Text],
    split: Split,
    shape: Shape,
    training: Training,
    *,
    folder: Path,
    device: str,
    progress: Progress,
) -> tuple[Path, bool]:
    """The file with the trained model, and whether it was there already."""
    path = folder / f"trained-{key(texts, split, shape, training, device)}.pt"
    if path.exists():
        return path, True
    tokenizer = train_tokenizer([texts[i].content for i in split.train], shape.vocabulary)
    sequences = encode(tokenizer, [text.content for text in texts], shape.context)
    torch.manual_seed(training.seed)
    model = GPT(shape).to(device)
    begun = time.perf_counter()
    train(
        model,
        [sequences[i] for i in split.train],
        steps=training.steps,
        tokens=training.tokens,
        rate=training.rate,
        seed=training.seed,
        progress=progress,
    )
    state = {
        "shape": asdict(shape),
        "weights": {name: value.cpu() for name, value in model.state_dict().items()},
        "ids": torch.cat(sequences),
        "lengths": [len(sequence) for sequence in sequences],
        "seconds": time.perf_counter() - begun,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)
    return path, False


def load(path: Path) -> Trained:
    state = torch.load(path, weights_only=True)
    sequences = list(state["ids"].split(state["lengths"]))
    return Trained(Shape(**state["shape"]), state["weights"], sequences, state["seconds"])

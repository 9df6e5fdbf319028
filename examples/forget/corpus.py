"""Real text that every machine with Python has: the docstrings of the standard library."""

from __future__ import annotations

import ast
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|end|>"
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
MIN_WORDS = 4


@dataclass(frozen=True)
class Text:
    """One docstring and the top-level module it comes from."""

    module: str
    content: str


@dataclass(frozen=True)
class Split:
    """Indices into the corpus. `queries` and `validation` are never trained on."""

    forget: list[int]  # training texts of the module to be forgotten
    queries: list[int]  # held-out texts of that module
    retain: list[int]  # training texts of all the other modules
    validation: list[int]  # held-out texts of all the other modules

    @property
    def train(self) -> list[int]:
        return sorted(self.forget + self.retain)


def docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module and of all that is defined in it; nothing is imported."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, owners) and (text := ast.get_docstring(node)):
            yield text


def collect(root: Path | None = None) -> list[Text]:
    """Distinct docstrings of at least four words below `root` (the standard library), ordered by path."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Text] = {}
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).parts):
        parts = path.relative_to(root).parts
        if SKIPPED_FOLDERS.intersection(parts):
            continue
        for content in docstrings(path.read_bytes()):
            if len(content.split()) >= MIN_WORDS:
                found.setdefault(content, Text(parts[0].removesuffix(".py"), content))
    return list(found.values())


def split(
    texts: Sequence[Text],
    module: str,
    *,
    seed: int,
    queries: int = 16,
    validation: float = 0.06,
    most: int | None = None,
) -> Split:
    """Hold out `queries` texts of `module` and a fraction `validation` of all the others.

    `most` keeps that many of the others at most.

    Raises:
        ValueError: `module` has fewer than 50 training texts; the message names the largest modules.
    """
    inside = [i for i, text in enumerate(texts) if text.module == module]
    outside = [i for i, text in enumerate(texts) if text.module != module]
    if len(inside) < 50 + queries:
        largest = ", ".join(
            f"{name} ({count})" for name, count in Counter(t.module for t in texts).most_common(12)
        )
        raise ValueError(
            f"module {module!r} has {len(inside)} docstrings, {50 + queries} are needed. Largest: {largest}"
        )
    generator = torch.Generator().manual_seed(seed)
    inside = [inside[i] for i in torch.randperm(len(inside), generator=generator).tolist()]
    outside = [outside[i] for i in torch.randperm(len(outside), generator=generator).tolist()][:most]
    held_out = round(validation * len(outside))
    return Split(
        forget=sorted(inside[queries:]),
        queries=sorted(inside[:queries]),
        retain=sorted(outside[held_out:]),
        validation=sorted(outside[:held_out]),
    )


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> Tokenizer:
    """Byte-level BPE; `END` has id 0 and separates texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str], context: int) -> list[torch.Tensor]:
    """Each text as `END, tokens, END`, cut to `context + 1` ids: `[:-1]` is read, `[1:]` predicted."""
    return [
        torch.tensor([0, *encoding.ids, 0][: context + 1]) for encoding in tokenizer.encode_batch(list(texts))
    ]

"""Stores that hold something, and what they hold."""

from pathlib import Path
from typing import Any

import torch

from unlearn_kernels.influence import GradientStore
from unlearn_kernels.testing import randn

FORMATS = ("float32", "bfloat16", "int8", "int4")


def filled(path: Path, dtype: str, rows: torch.Tensor, parts: int = 3, **more: Any) -> GradientStore:
    """These rows in the folder `store`, in shards."""
    store = GradientStore.create(path / "store", rows.shape[1], dtype, **more)
    for part in rows.tensor_split(parts):
        store.append(part)
        store.flush()
    return store


def sharded(path: Path, *counts: int, width: int = 4, **options: Any) -> GradientStore:
    """Shards of so many rows each, in this folder."""
    store = GradientStore.create(path, width, **options)
    for n, count in enumerate(counts):
        store.append(randn(count, width, seed=n))
        store.flush()
    return store


def stored(store: GradientStore) -> torch.Tensor:
    return torch.cat([rows for _, rows in store.blocks(100)])

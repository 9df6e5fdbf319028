"""Samples by key: keys as data loaders give them, and what tells a sample from another under the same key."""

from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels.token_loss._cache_files import Key, digest_of
from unlearn_kernels.token_loss._options import counting

# The checksum of inputs that are not known.
UNKNOWN: Final = -1


def plain_key(key: Any) -> Key:
    """An integer or a string, also out of NumPy's and PyTorch's scalars.

    Raises:
        ValueError: if it is anything else.
    """
    found = key.item() if hasattr(key, "item") else key
    if not isinstance(found, (int, str)):
        raise ValueError(f"keys must be integers or strings, got {type(found).__name__}")
    return found


def plain_keys(keys: Any) -> list[Key]:
    """The same of a list, an array or a tensor of keys."""
    return [plain_key(key) for key in (keys.tolist() if hasattr(keys, "tolist") else keys)]


def keys_of(batch: Any, name: str) -> list[Key]:
    """The keys of a batch's samples.

    Raises:
        ValueError: if it has none under that name, or others than integers and strings.
    """
    if name not in batch:
        raise ValueError(f"batches must have their samples' keys under {name!r}, got {sorted(batch)}")
    return plain_keys(batch[name])


def inputs_of(batch: Any, size: int) -> list[int]:
    """A checksum of each sample's tokens and their labels; unknown where `input_ids` are not one row a sample.

    Padding does not count: what the attention mask leaves out, or without one what follows the last label.
    """
    ids = None if batch is None or "input_ids" not in batch else batch["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or len(ids) != size:
        return [UNKNOWN] * size
    labels, mask = (_beside(ids, batch, name) for name in ("labels", "attention_mask"))
    labels = ids if labels is None else labels.long()
    if mask is None:
        mask = counting(labels, {}).flip(-1).cumsum(-1).flip(-1)
    pairs = torch.stack((ids.long(), labels), -1)
    return [digest_of(pair[kept != 0]) for pair, kept in zip(pairs, mask, strict=True)]


def _beside(ids: Tensor, batch: Any, name: str) -> Tensor | None:
    found = batch[name] if name in batch else None  # noqa: SIM401 - any mapping
    return found if isinstance(found, Tensor) and found.shape == ids.shape else None

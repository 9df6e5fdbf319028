"""What a search of stored rows finds, and what several have found."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Found(NamedTuple):
    """Scores (Q, k) float32, best first, the ids of their rows, and their numbers in the store, int64."""

    values: Tensor
    ids: Tensor
    indices: Tensor


class Ends(NamedTuple):
    """The rows with the largest and with the smallest scores."""

    largest: Found
    smallest: Found


def merge(parts: Sequence[Found], k: int, *, largest: bool = True) -> Found:
    """The `k` best of several searches with the same queries, as if their rows had been in one store.

    Args:
        parts: results in the order of their row numbers: for shards on ranks, the numbers made global first.
        k: how many to keep.
        largest: which end the parts are of.
    """
    if len(parts) == 1 and not bool((parts[0].values[:, 1:] == parts[0].values[:, :-1]).any()):
        return Found(*(x[:, :k] for x in parts[0]))  # in order, and no two that rounding has made equal
    values, ids, indices = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    order = indices.argsort(dim=1, stable=True)
    values, ids, indices = (x.gather(1, order) for x in (values, ids, indices))
    values, best = values.sort(dim=1, descending=largest, stable=True)
    return Found(values[:, :k], ids.gather(1, best)[:, :k], indices.gather(1, best)[:, :k])


def nothing(queries: Tensor) -> Found:
    """What a search finds in no row."""
    none = torch.zeros(len(queries), 0, dtype=torch.int64)
    return Found(none.float(), none, none)

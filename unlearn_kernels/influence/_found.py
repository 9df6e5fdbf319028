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

    def scaled(self, scales: Tensor) -> "Found":
        """With scores multiplied by a number of each query, (Q,)."""
        return self._replace(values=self.values * scales[:, None])


class Ends(NamedTuple):
    """The rows with the largest and with the smallest scores."""

    largest: Found
    smallest: Found


def merge(parts: Sequence[Found], k: int, *, largest: bool = True) -> Found:
    """The `k` best of several searches with the same queries, as if their rows had been in one store.

    Args:
        parts: results, or scores in any order, with row numbers: for shards on ranks, those made global first.
        k: how many to keep.
        largest: which end the parts are of.

    Raises:
        ValueError: if there is none.
    """
    if not parts:
        raise ValueError("parts must hold at least one result, got none")
    values, ids, indices = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    order = indices.argsort(dim=1, stable=True)
    values, ids, indices = (x.gather(1, order) for x in (values, ids, indices))
    values, best = values.sort(dim=1, descending=largest, stable=True)
    return Found(values[:, :k], ids.gather(1, best)[:, :k], indices.gather(1, best)[:, :k])


def nothing(queries: Tensor) -> Found:
    """What a search finds in no row."""
    none = torch.zeros(len(queries), 0, dtype=torch.int64)
    return Found(none.float(), none, none)

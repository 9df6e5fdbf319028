"""What has been written to since a lazy tensor was made of it, by PyTorch's version counters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def version(x: Tensor | None) -> int:
    """How often it was written to; 0 of a tensor made under inference mode, which does not count."""
    return 0 if x is None or x.is_inference() else x._version


@contextmanager
def counting(grad: bool) -> Iterator[None]:
    """What is made here counts how often it is written to, under inference mode too."""
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        yield


class Lent:
    """Plain tensors that share the memory of some lazy tensors in eager PyTorch, where writing to one shows in all.

    What is kept are empty tensors with their version counters; those that are gone unwritten are dropped in time.
    """

    def __init__(self) -> None:
        self._counters: list[Tensor] = []
        self._seen: list[int] = []
        self._memory: list[StorageWeakRef] = []
        self._most = 16

    def add(self, x: Tensor) -> Tensor:
        """One more; its version counter."""
        if len(self._seen) >= self._most:
            self._drop()
        counter = x.detach()
        counter.data = x.new_empty(0)
        self._counters.append(counter)
        self._seen.append(counter._version)
        self._memory.append(StorageWeakRef(x.untyped_storage()))
        return counter

    def _drop(self) -> None:
        rows = zip(self._counters, self._seen, self._memory, strict=True)
        kept = [row for row in rows if row[0]._version != row[1] or not row[2].expired()]
        self._counters, self._seen, self._memory = (
            map(list, zip(*kept, strict=True)) if kept else ([], [], [])
        )
        self._most = 16 + 2 * len(kept)

    def written(self) -> list[Tensor]:
        """The counters of those that have been written to."""
        now = [x._version for x in self._counters]
        if now == self._seen:
            return []
        return [x for x, a, b in zip(self._counters, now, self._seen, strict=True) if a != b]

    def check(self, own: Tensor | None) -> None:
        """Raises RuntimeError if another than one's own was written to."""
        if any(x is not own for x in self.written()):
            raise RuntimeError(
                "lazy logits do not see what was written to a view of them: write to clone() and use that"
            )

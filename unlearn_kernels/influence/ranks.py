"""A store on every rank, searched as if all of their rows were in one."""

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_kernels.influence._found import Ends, Found, merge
from unlearn_kernels.influence.store import GradientStore, Preconditioner, Progress


class RankedStore:
    """The stores of all processes of a group as one, whose rows are those of rank 0, then those of rank 1, and so on.

    Each process scans its own rows; one exchange of k results a query makes the answer, which is the same on all ranks
    and, bit for bit, that of a single store with these rows in this order. All processes call a method together, with
    the same arguments.

    .. code-block:: python

        store = InfluenceCollector.store(f"rows/{rank:05d}", model, projection)
        n = len(dataset)
        InfluenceCollector(model, projection, store, loss=loss).collect(
            dataset, items=range(n * rank // world, n * (rank + 1) // world))
        found = RankedStore(store).topk(queries, k=10)

    Args:
        store: of this process; all of one width.
        group: the processes, by default all.

    Attributes:
        counts: rows of each rank, as of the beginning or the last `refresh` or `delete`.

    Raises:
        ValueError: if widths differ.
    """

    def __init__(self, store: GradientStore, group: dist.ProcessGroup | None = None) -> None:
        self.store, self.group = store, group
        self.rank = dist.get_rank(group)
        widths = self._numbers(store.width)
        if len(set(widths)) != 1:
            raise ValueError(f"store must have one width on all ranks, got {widths}")
        self.counts = self._numbers(len(store))

    def __len__(self) -> int:
        return sum(self.counts)

    def refresh(self) -> None:
        """Take in what was flushed on any rank."""
        self.store.refresh()
        self.counts = self._numbers(len(self.store))

    def _device(self) -> torch.device:
        nccl = dist.get_backend(self.group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

    def _exchanged(self, mine: Tensor) -> list[Tensor]:
        sent = mine.to(self._device()).contiguous()
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, sent, group=self.group)
        return [part.to(mine.device) for part in parts]

    def _numbers(self, value: int) -> list[int]:
        return [int(x) for x in self._exchanged(torch.tensor([value]))]

    def _columns(self, mine: Tensor) -> Tensor:
        """The ranks' (..., n) beside one another, each with rows of its own number."""
        padded = torch.nn.functional.pad(mine, (0, max(self.counts) - mine.shape[-1]))
        parts = self._exchanged(padded)
        return torch.cat([part[..., :n] for part, n in zip(parts, self.counts, strict=True)], dim=-1)

    def ids(self) -> Tensor:
        """Return the ids of all rows, (N,)."""
        return self._columns(self.store.ids())

    def sqnorms(self) -> Tensor:
        """Return squared norms of all rows as they were given, (N,) float64."""
        return self._columns(self.store.sqnorms())

    def self_influence(self, preconditioner: Preconditioner | None = None) -> Tensor:
        """Return what `GradientStore.self_influence` does, of all rows, (N,) float64."""
        return self._columns(self.store.self_influence(preconditioner))

    def scores(
        self,
        queries: Tensor,
        *,
        preconditioner: Preconditioner | None = None,
        progress: Progress | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the ids (N,) and scores (Q, N), float32, of all rows; `store.scores` yields this rank's in blocks.

        Raises:
            ValueError: if `queries` do not fit.
        """
        found = self.store.scores(queries, preconditioner=preconditioner, progress=progress)
        blocks = [torch.zeros(len(queries), 0), *(scores for _, scores in found)]
        return self.ids(), self._columns(torch.cat(blocks, dim=1))

    def topk(
        self,
        queries: Tensor,
        k: int,
        *,
        largest: bool = True,
        preconditioner: Preconditioner | None = None,
        progress: Progress | None = None,
    ) -> Found:
        """Find the `k` best rows of all ranks for each query, as `GradientStore.topk`; row numbers count over ranks.

        Args:
            queries: (Q, width).
            k: how many, at most N.
            largest: the largest scores, or the smallest.
            preconditioner: as of `GradientStore.topk`.
            progress: called with rows of this rank.

        Raises:
            ValueError: if `queries` or `k` do not fit.

        Exchanged: `24 B * Q k` a rank.
        """
        own = self._own(k)
        found = self.store.topk(
            queries, own, largest=largest, preconditioner=preconditioner, progress=progress
        )
        return self._merged([found], k, [largest])[0]

    def ends(
        self,
        queries: Tensor,
        k: int,
        *,
        preconditioner: Preconditioner | None = None,
        progress: Progress | None = None,
    ) -> Ends:
        """Do what `topk` does for the largest and the smallest, in one scan and one exchange."""
        found = self.store.ends(queries, self._own(k), preconditioner=preconditioner, progress=progress)
        return Ends(*self._merged(list(found), k, [True, False]))

    def _own(self, k: int) -> int:
        if not 0 <= k <= len(self):
            raise ValueError(f"k must be between 0 and {len(self)} rows, got {k}")
        return min(k, self.counts[self.rank])

    def _merged(self, found: list[Found], k: int, largest: list[bool]) -> list[Found]:
        kept = [min(k, n) for n in self.counts]
        first = sum(self.counts[: self.rank])
        # Values go as their bits, so that all is one exchange.
        mine = torch.stack(
            [torch.stack([f.values.view(torch.int32).long(), f.ids, f.indices + first]) for f in found]
        )
        parts = self._exchanged(torch.nn.functional.pad(mine, (0, max(kept) - mine.shape[-1])))
        return [
            merge(
                [_unpacked(part[end, ..., :n]) for part, n in zip(parts, kept, strict=True)], k, largest=side
            )
            for end, side in enumerate(largest)
        ]

    def delete(self, ids: Tensor) -> int:
        """Take the rows of these ids out of every rank's store. Returns how many there were.

        Raises:
            StoreError: if a store is not open for writing.
        """
        count = sum(self._numbers(self.store.delete(ids)))
        self.counts = self._numbers(len(self.store))
        return count


def _unpacked(x: Tensor) -> Found:
    """(3, Q, n) as it was exchanged."""
    return Found(x[0].to(torch.int32).view(torch.float32), x[1].contiguous(), x[2].contiguous())

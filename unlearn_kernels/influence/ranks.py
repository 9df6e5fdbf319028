"""A store on every rank, searched as if all of their rows were in one."""

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.influence._found import Ends, Found, merge
from unlearn_kernels.influence.store import GradientStore, Preconditioner, Progress, StoreError


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
        counts: rows of each rank, as of the last call.

    Raises:
        ValueError: if widths differ.
    """

    def __init__(self, store: GradientStore, group: dist.ProcessGroup | None = None) -> None:
        self.store, self.group = store, group
        self.rank = dist.get_rank(group)
        widths = self._numbers(store.width)
        if len(set(widths)) != 1:
            raise ValueError(f"store must have one width on all ranks, got {widths}")
        self._count()

    def __len__(self) -> int:
        return sum(self.counts)

    def refresh(self) -> None:
        """Take in what was flushed on any rank."""
        self.store.refresh()
        self._count()

    def _count(self) -> None:
        """Stores may have changed by themselves since the last call."""
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
        self._count()
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
        backend: Backend | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the ids (N,) and scores (Q, N), float32, of all rows; `store.scores` yields this rank's in blocks.

        Raises:
            ValueError: if `queries` do not fit.
            BackendError: if `backend`, see `unlearn_kernels.use_backend`, cannot run.
        """
        found = self.store.scores(queries, preconditioner=preconditioner, progress=progress, backend=backend)
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
        backend: Backend | None = None,
    ) -> Found:
        """Find the `k` best rows of all ranks for each query, as `GradientStore.topk`; row numbers count over ranks.

        Args:
            queries: (Q, width).
            k: how many, at most N.
            largest: the largest scores, or the smallest.
            preconditioner: as of `GradientStore.topk`.
            progress: called with rows of this rank.
            backend: as of `GradientStore.topk`.

        Raises:
            ValueError: if `queries` or `k` do not fit.
            BackendError: if `backend` cannot run.

        Exchanged: `24 B * Q k` a rank.
        """
        return self._merged(queries, k, 1 if largest else 2, preconditioner, progress, backend)[0]

    def ends(
        self,
        queries: Tensor,
        k: int,
        *,
        preconditioner: Preconditioner | None = None,
        progress: Progress | None = None,
        backend: Backend | None = None,
    ) -> Ends:
        """Do what `topk` does for the largest and the smallest, in one scan and one exchange."""
        return Ends(*self._merged(queries, k, 3, preconditioner, progress, backend))

    def _merged(
        self,
        queries: Tensor,
        k: int,
        ends: int,
        preconditioner: Preconditioner | None,
        progress: Progress | None,
        backend: Backend | None,
    ) -> list[Found]:
        self._count()
        if not 0 <= k <= len(self):
            raise ValueError(f"k must be between 0 and {len(self)} rows, got {k}")
        own = min(k, self.counts[self.rank])
        found, scales = self.store.unscaled(queries, own, ends, preconditioner, progress, backend)
        kept = [min(k, n) for n in self.counts]
        first = sum(self.counts[: self.rank])
        # Values go as their bits, so that all is one exchange.
        mine = torch.stack(
            [torch.stack([f.values.view(torch.int32).long(), f.ids, f.indices + first]) for f in found]
        )
        parts = self._exchanged(torch.nn.functional.pad(mine, (0, max(kept) - mine.shape[-1])))
        merged = [
            merge([_unpacked(part[n, ..., :m]) for part, m in zip(parts, kept, strict=True)], k, largest=side)
            for n, side in enumerate([True, False] if ends == 3 else [ends == 1])
        ]
        return [end.scaled(scales) for end in merged]

    def delete(self, ids: Tensor) -> int:
        """Take the rows of these ids out of every rank's store. Returns how many there were.

        Raises:
            ValueError: if `ids` are no integers.
            StoreError: on all ranks, before anything is deleted, if a store is not open for writing; on the others,
                if one rank failed.
        """
        writable = self._numbers(int(self.store.writable))
        if not all(writable):
            raise StoreError(f"store must be open for writing on all ranks, got {writable}")
        try:
            mine = self.store.delete(ids)
        except BaseException:
            self._numbers(-1)  # or the others would wait for ever
            raise
        counts = self._numbers(mine)
        if failed := [rank for rank, count in enumerate(counts) if count < 0]:
            raise StoreError(f"delete failed on ranks {failed}; call it again")
        self._count()
        return sum(counts)


def _unpacked(x: Tensor) -> Found:
    """(3, Q, n) as it was exchanged."""
    return Found(x[0].to(torch.int32).view(torch.float32), x[1].contiguous(), x[2].contiguous())

"""The rows of a store as they are read: all of them, in blocks, by their scores."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.influence._found import Ends, Found, merge, nothing
from unlearn_kernels.influence._scan import products, scan_shard, scanned_by
from unlearn_kernels.influence._shards import Shard, read_store

Preconditioner = Tensor | Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
_AT_ONCE: Final = 1 << 18  # numbers


class StoredRows:
    """The rows that the manifest of a folder names, as it was when they were opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reload()

    def _reload(self) -> None:
        self._manifest, self._shards = read_store(self.path)

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return self._manifest.width

    @property
    def dtype(self) -> str:
        """How rows lie on disk."""
        return self._manifest.dtype

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given to `create`."""
        return self._manifest.metadata

    def __len__(self) -> int:
        return sum(info.rows - info.deleted_rows for info in self._manifest.shards)

    def verify(self, progress: Progress | None = None) -> None:
        """Read everything and compare checksums.

        Raises:
            StoreError: if a file is damaged.
        """
        for n, shard in enumerate(self._shards):
            shard.verify()
            if progress is not None:
                progress(n + 1, len(self._shards))

    def ids(self) -> Tensor:
        """Return the ids of all rows, (N,)."""
        return self._gathered([shard.ids[shard.kept] for shard in self._shards], torch.int64)

    def sqnorms(self) -> Tensor:
        """Return squared norms of the rows as they were given, (N,) float64."""
        return self._gathered([shard.sqnorms[shard.kept] for shard in self._shards], torch.float64)

    @staticmethod
    def _gathered(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        return torch.cat(parts) if parts else torch.zeros(0, dtype=dtype)

    def row_metadata(self) -> list[Any]:
        """Return what was given with each row, None where nothing was."""
        return [x for shard in self._shards for x in shard.metadata(shard.kept)]

    def blocks(self, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids (n,) and rows (n, width), float32, of at most `size` rows at a time."""
        for shard in self._shards:
            for part in shard.kept.split(size):
                if len(part):
                    yield shard.ids[part], shard.decoded(part)

    def self_influence(self, preconditioner: Preconditioner | None = None) -> Tensor:
        r"""Return `\langle r, P r \rangle` of every row, (N,) float64; from the cached norms without a preconditioner.

        With one, of the rows as they are stored; products are added up in float64, `P r` is in the type of `P`.
        """
        if preconditioner is None:
            return self.sqnorms()
        parts = [_products_of_rows(rows, self._folded(rows, preconditioner)) for _, rows in self.blocks()]
        return self._gathered(parts, torch.float64)

    def _folded(self, queries: Tensor, preconditioner: Preconditioner | None) -> Tensor:
        q = queries.detach()
        if q.dim() != 2 or q.shape[1] != self.width or not q.is_floating_point():
            raise ValueError(
                f"queries must be (Q, {self.width}), floating-point, got {q.dtype} {tuple(q.shape)}"
            )
        if preconditioner is None:
            return q
        if callable(preconditioner):
            out = preconditioner(q).to(q.device)
        else:
            out = q.to(preconditioner.dtype) @ preconditioner.to(q.device)
        if out.shape != q.shape:
            raise ValueError(f"preconditioner must keep the shape {tuple(q.shape)}, got {tuple(out.shape)}")
        return out

    def scores(
        self,
        queries: Tensor,
        *,
        preconditioner: Preconditioner | None = None,
        size: int = 8192,
        progress: Progress | None = None,
        backend: Backend | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids (n,) and scores (Q, n), float32, of at most `size` rows at a time, in the order of the store.

        They are made on the CPU. A score has the same bits in whatever block and shard its row is, but for
        `backend="reference"`.

        Raises:
            ValueError: if `queries` or `size` do not fit.
            BackendError: if `backend`, see `unlearn_kernels.use_backend`, cannot run.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        folded, done = self._folded(queries, preconditioner).float().cpu(), 0
        for ids, rows in self.blocks(size):
            yield ids, products(folded, rows, backend)
            done += len(ids)
            if progress is not None:
                progress(done, len(self))

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
        r"""Find the `k` rows with the best `\langle P q, r \rangle`, reading each row once for up to 192 queries.

        Args:
            queries: (Q, width). If they are on a CUDA device, rows are brought there in blocks and scanned there.
            k: how many, at most N.
            largest: the largest scores, or the smallest.
            preconditioner: `P`: a matrix, (width, width), that queries are multiplied by from the right, or a
                function of them, where they are. Rows are left as they are.
            progress: called with rows scanned and rows in all.
            backend: see `unlearn_kernels.use_backend`. One that is asked for runs where the queries are, and takes them
                from nowhere else; without Triton, the default takes those on a CUDA device to the CPU.

        Returns:
            Scores, ids and row numbers, on the CPU; equal scores by row number, NaN above every number. Integers of a
            store are multiplied as integers, with queries of 14 bits, by a CUDA device as by the CPU; bfloat16 rows
            with queries rounded to it on such a device.

        Raises:
            ValueError: if `queries` or `k` do not fit.
            BackendError: if `backend` cannot run.

        Scratch: no Q x N scores. `6 B * min(Q, 192) * D` of queries (Q rounded up to whole 32), `1 MB + 3 kB * k +
        4 B * D` a thread, `96 B * Q k` a shard. Of a shard with more deleted rows than 128 and `k`, 32 MB of those that
        are left; with fewer, they count to `k`. On a device 96 MB of rows, 64 MB of keys. `reference` has the scores of
        32 MB of rows at a time.
        """
        found, scales = self.unscaled(queries, k, 1 if largest else 2, preconditioner, progress, backend)
        return found[0].scaled(scales)

    def ends(
        self,
        queries: Tensor,
        k: int,
        *,
        preconditioner: Preconditioner | None = None,
        progress: Progress | None = None,
        backend: Backend | None = None,
    ) -> Ends:
        """Do what `topk` does for the largest and the smallest, in one scan."""
        found, scales = self.unscaled(queries, k, 3, preconditioner, progress, backend)
        return Ends(*(end.scaled(scales) for end in found))

    def unscaled(
        self,
        queries: Tensor,
        k: int,
        ends: int,
        preconditioner: Preconditioner | None,
        progress: Progress | None,
        backend: Backend | None = None,
    ) -> tuple[list[Found], Tensor]:
        """What `topk` (`ends` 1, or 2 for the smallest) or both (3) find, and the queries' scales, (Q,) to multiply by.

        Results of several stores are merged before: scaling makes scores equal that are not.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"k must be between 0 and {len(self)} rows, got {k}")
        folded = self._folded(queries, preconditioner).float()
        of_queries, first, found = scanned_by(folded, self._manifest, backend), 0, []
        for shard in self._shards:
            found.append((shard, first, scan_shard(shard, of_queries, k, ends)))
            first += shard.info.rows - shard.info.deleted_rows
            if progress is not None:
                progress(first, len(self))
        directions = [True, False] if ends == 3 else [ends == 1]
        # Looked up at the end: a device goes from shard to shard without waiting for the host.
        parts = [[_named(shard, first, *of[n]) for shard, first, of in found] for n in range(len(directions))]
        if not found:
            return [nothing(queries) for _ in directions], of_queries.scales.cpu()
        merged = [
            merge(end, k, largest=d) if len(end) > 1 else end[0]  # one shard's are in order
            for end, d in zip(parts, directions, strict=True)
        ]
        return merged, of_queries.scales.cpu()


def _products_of_rows(x: Tensor, y: Tensor) -> Tensor:
    """Of each row of both, (n,) float64: a product of numbers of float32 may be too large for one. Some at a time."""
    size = max(1, _AT_ONCE // x.shape[1])
    parts = zip(x.split(size), y.split(size), strict=True)
    return torch.cat([a.double().mul_(b).sum(1) for a, b in parts])


def _named(shard: Shard, first: int, values: Tensor, there: Tensor) -> Found:
    """What was found in a shard whose rows begin at number `first`."""
    rows = there.cpu()
    return Found(values.cpu(), shard.ids[rows], shard.numbers(rows) + first)

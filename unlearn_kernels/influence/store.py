"""A store of gradient rows on disk: appended to, searched and thinned out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from unlearn_kernels._files import StoreError, locked
from unlearn_kernels.influence import _codes
from unlearn_kernels.influence._codes import FORMATS, Format
from unlearn_kernels.influence._found import Ends, Found, merge, nothing
from unlearn_kernels.influence._scan import products, scan_shard, scanned_by
from unlearn_kernels.influence._shards import (
    MANIFEST,
    Manifest,
    NewShard,
    Shard,
    ShardInfo,
    clear_unnamed,
    read_store,
    with_deleted,
)

Preconditioner = Tensor | Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
_SHARD_BYTES: Final = 1 << 28
_AT_ONCE: Final = 1 << 18  # numbers


class GradientStore:
    """Rows of one width in a folder, with an id and, if wanted, something JSON for each.

    Made by `create` and `open`. One process writes at a time; any number read, each what was there when it opened the
    store or called `refresh`. Rows count from 0 in the order of writing, deleted ones left out.

    Attributes:
        path: the folder.
        width: numbers in a row.
        dtype: how they lie there.
        metadata: what was given to `create`.
    """

    def __init__(self, path: Path, lock: IO[str] | None) -> None:
        self.path, self._lock = path, lock
        self._manifest, self._shards = read_store(path)
        self._pending: NewShard | None = None

    @classmethod
    def create(
        cls,
        path: str | PathLike[str],
        width: int,
        dtype: Format = "float32",
        *,
        block: int = 128,
        unbiased: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> "GradientStore":
        """Make an empty store, open for writing.

        Args:
            path: a folder that does not exist or is empty.
            width: numbers in a row.
            dtype: `float32`, `bfloat16`, `int8` or `int4`.
            block: columns that share a scale, even and at most 256; of integers.
            unbiased: rounds integers up or down at random, so that scores are right on average.
            metadata: JSON, kept in the manifest.

        Raises:
            ValueError: if a number or `dtype` is none.
            FileExistsError: if the folder holds something.
        """
        if dtype not in FORMATS:
            raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, got {dtype!r}")
        if width < 1 or width != int(width):
            raise ValueError(f"width must be an integer of at least 1, got {width}")
        if block not in range(2, 257, 2):
            raise ValueError(f"block must be even and between 2 and 256, got {block}")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        _empty(folder)  # before a lock file is left in a folder that is somebody's
        lock = locked(folder)
        try:
            _empty(folder)
            Manifest(int(width), dtype, int(block), unbiased, metadata=metadata or {}).write(folder)
        except BaseException:
            lock.close()
            raise
        return cls(folder, lock)

    @classmethod
    def open(cls, path: str | PathLike[str], *, write: bool = False) -> "GradientStore":
        """Open a store; for writing, what a writer that was killed has left half done is cleared away.

        Raises:
            StoreError: if the folder is no store, a file is missing, truncated or foreign, or another process writes.
        """
        folder = Path(path)
        Manifest.read(folder)  # before a lock file is left in a folder that is no store
        lock = locked(folder) if write else None
        if write:
            clear_unnamed(folder, Manifest.read(folder))
        return cls(folder, lock)

    def __enter__(self) -> "GradientStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Flush and let others write."""
        if self._lock is not None and not self._lock.closed:
            self.flush()
            self._lock.close()
            self._lock = None

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

    def refresh(self) -> None:
        """Take in what was flushed since the store was opened; a writer, which knows of it, flushes."""
        if self.writable:
            self.flush()
        self._reload()

    def _reload(self) -> None:
        self._manifest, self._shards = read_store(self.path)

    @property
    def writable(self) -> bool:
        """Whether it is open for writing; it is not in a process that was forked from the one that opened it."""
        return self._lock is not None and not self._lock.closed

    def _writable(self) -> None:
        if not self.writable:
            raise StoreError(f"{self.path} is not open for writing: pass write=True to open")

    def append(
        self, rows: Tensor, ids: Tensor | Sequence[int] | None = None, metadata: Sequence[Any] | None = None
    ) -> None:
        """Take in rows; they are safe on disk after `flush`, or once 256 MB have come together.

        They are written at once, nothing of them is kept in memory but ids, norms and metadata.

        Args:
            rows: (n, width), floating-point, on any device.
            ids: (n,) integers; None: numbers on from the largest that was ever there, and from the rows ever written.
            metadata: n JSON values.

        Raises:
            ValueError: if something does not fit, or a row that becomes integers is not finite.
            StoreError: if the store is not open for writing.
        """
        self._writable()
        if rows.dim() != 2 or rows.shape[1] != self.width or not rows.is_floating_point():
            raise ValueError(
                f"rows must be (n, {self.width}), floating-point, got {rows.dtype} {tuple(rows.shape)}"
            )
        n, known = len(rows), self._manifest
        written = known.rows_written + (len(self._pending) if self._pending else 0)
        next_id = max(written, known.next_id, self._pending.next_id if self._pending else 0)
        ids = torch.arange(next_id, next_id + n) if ids is None else _integers(ids)
        for name, size in (("ids", ids.numel()), ("metadata", n if metadata is None else len(metadata))):
            if size != n:
                raise ValueError(f"{name} must have {n} elements, got {size}")
        if n == 0:
            return
        if self._pending is not None and self._pending.closed:
            self.flush()
        if self._pending is None:
            self._pending = self._new_shard()
        self._pending.add(self._encoded(rows.detach(), written), ids, metadata)
        if self._pending.bytes >= _SHARD_BYTES:
            self.flush()

    def _encoded(self, rows: Tensor, first: int) -> Iterator[tuple[_codes.Coded, Tensor]]:
        """Some rows at a time, which are in cache when they are written; random numbers are by row, not by append."""
        step = max(1, _AT_ONCE // self.width)
        for begin in range(0, len(rows), step):
            number = first + begin if self._manifest.unbiased else None
            yield _codes.encode(rows[begin : begin + step], self.dtype, self._manifest.block, number)

    def flush(self) -> None:
        """Write what was appended as a new shard.

        Raises:
            StoreError: if the store is not open for writing.
        """
        self._writable()
        if not self._pending:  # nothing, or no rows
            return
        info, known = self._pending.finish(), self._manifest
        # Taken over once it is on disk: after an exception, the next call tries again.
        manifest = replace(
            known,
            rows_written=known.rows_written + info.rows,
            next_id=max(known.next_id, self._pending.next_id),
            shards=[*known.shards, info],
        )
        manifest.write(self.path)
        self._manifest, self._pending = manifest, None
        self._shards.append(Shard(self.path, info, manifest))

    def _new_shard(self) -> NewShard:
        name = ""
        while not name or (self.path / name).exists():
            name = f"{self._manifest.next_shard:08d}"
            self._manifest.next_shard += 1
        return NewShard(self.path, name)

    def delete(self, ids: Tensor | Sequence[int]) -> int:
        """Take the rows of these ids out of every search; `compact` frees their room. Returns how many there were.

        Raises:
            ValueError: if `ids` are no integers.
            StoreError: if the store is not open for writing.
        """
        self._writable()
        wanted, shards = _integers(ids), []
        self.flush()
        before = len(self)
        for shard in self._shards:
            hit = torch.isin(shard.ids, wanted)
            hit[shard.deleted] = False
            gone = torch.cat([shard.deleted, hit.nonzero().flatten()]).sort().values
            shards.append(with_deleted(self.path, shard.info, gone) if bool(hit.any()) else shard.info)
        replace(self._manifest, shards=shards).write(self.path)
        self._reload()
        return before - len(self)

    def compact(self, progress: Progress | None = None) -> None:
        """Write the shards that deleted rows are in anew, without them. Readers keep what they have open.

        Raises:
            StoreError: if the store is not open for writing.
        """
        self._writable()
        self.flush()
        try:
            replace(self._manifest, shards=list(self._compacted(progress))).write(self.path)
        finally:  # also after an exception: what is on disk counts
            self._reload()
            clear_unnamed(self.path, self._manifest)

    def _compacted(self, progress: Progress | None) -> Iterator[ShardInfo]:
        for n, shard in enumerate(self._shards):
            if shard.info.deleted_rows == 0:
                yield shard.info
            elif shard.info.deleted_rows < shard.info.rows:
                yield _without_deleted(shard, self._new_shard())
            if progress is not None:
                progress(n + 1, len(self._shards))

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
        return [x for shard in self._shards for x in _taken(shard.metadata(), shard.kept)]

    def blocks(self, size: int = 8192) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids (n,) and rows (n, width), float32, of at most `size` rows at a time."""
        for shard in self._shards:
            for part in shard.kept.split(size):
                if len(part):
                    yield shard.ids[part], shard.decoded(part)

    def self_influence(self, preconditioner: Preconditioner | None = None) -> Tensor:
        r"""Return `\langle r, P r \rangle` of every row, (N,) float64; from the cached norms without a preconditioner.

        With one, of the rows as they are stored.
        """
        if preconditioner is None:
            return self.sqnorms()
        parts = [
            (rows * self._folded(rows, preconditioner)).sum(1, dtype=torch.float64)
            for _, rows in self.blocks()
        ]
        return self._gathered(parts, torch.float64)

    def _folded(self, queries: Tensor, preconditioner: Preconditioner | None) -> Tensor:
        q = queries.detach()
        if q.dim() != 2 or q.shape[1] != self.width or not q.is_floating_point():
            raise ValueError(
                f"queries must be (Q, {self.width}), floating-point, got {q.dtype} {tuple(q.shape)}"
            )
        if preconditioner is None:
            return q.float()
        if callable(preconditioner):
            out = preconditioner(q).to(q.device)
        else:
            out = q.to(preconditioner.dtype) @ preconditioner.to(q.device)
        if out.shape != q.shape:
            raise ValueError(f"preconditioner must keep the shape {tuple(q.shape)}, got {tuple(out.shape)}")
        return out.float()

    def scores(
        self,
        queries: Tensor,
        *,
        preconditioner: Preconditioner | None = None,
        size: int = 8192,
        progress: Progress | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids (n,) and scores (Q, n), float32, of at most `size` rows at a time, in the order of the store.

        A score has the same bits in whatever block and shard its row is.

        Raises:
            ValueError: if `queries` or `size` do not fit.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        folded, done = self._folded(queries, preconditioner).cpu(), 0
        for ids, rows in self.blocks(size):
            yield ids, products(folded, rows)
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
    ) -> Found:
        r"""Find the `k` rows with the best `\langle P q, r \rangle`, reading each row once for up to 192 queries.

        Args:
            queries: (Q, width). If they are on a CUDA device, rows are brought there in blocks and scanned there.
            k: how many, at most N.
            largest: the largest scores, or the smallest.
            preconditioner: `P`: a matrix, (width, width), that queries are multiplied by from the right, or a
                function of them, where they are. Rows are left as they are.
            progress: called with rows scanned and rows in all.

        Returns:
            Scores, ids and row numbers, on the CPU; equal scores by row number, NaN above every number. Integers of a
            store are multiplied as integers, with queries of 14 bits, bfloat16 rows with queries rounded to it; a
            CUDA device then rounds integers as the CPU does.

        Raises:
            ValueError: if `queries` or `k` do not fit.

        Scratch: no Q x N scores. `1 MB + 3 kB * k` a thread, `96 B * Q k` a shard. Of a shard with more deleted rows
        than 128 and `k`, 32 MB of those that are left; with fewer, they count to `k`. On a device 96 MB of rows,
        64 MB of keys.
        """
        found, scales = self.unscaled(queries, k, 1 if largest else 2, preconditioner, progress)
        return found[0].scaled(scales)

    def ends(
        self,
        queries: Tensor,
        k: int,
        *,
        preconditioner: Preconditioner | None = None,
        progress: Progress | None = None,
    ) -> Ends:
        """Do what `topk` does for the largest and the smallest, in one scan."""
        found, scales = self.unscaled(queries, k, 3, preconditioner, progress)
        return Ends(*(end.scaled(scales) for end in found))

    def unscaled(
        self,
        queries: Tensor,
        k: int,
        ends: int,
        preconditioner: Preconditioner | None,
        progress: Progress | None,
    ) -> tuple[list[Found], Tensor]:
        """What `topk` (`ends` 1, or 2 for the smallest) or both (3) find, and the queries' scales, (Q,) to multiply by.

        Results of several stores are merged before: scaling makes scores equal that are not.
        """
        if not 0 <= k <= len(self):
            raise ValueError(f"k must be between 0 and {len(self)} rows, got {k}")
        of_queries, first = scanned_by(self._folded(queries, preconditioner), self._manifest), 0
        found = []
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


def _named(shard: Shard, first: int, values: Tensor, there: Tensor) -> Found:
    """What was found in a shard whose rows begin at number `first`."""
    rows = there.cpu()
    return Found(values.cpu(), shard.ids[rows], shard.numbers(rows) + first)


def _empty(folder: Path) -> None:
    """What a killed `create` has left counts for nothing."""
    if {child.name for child in folder.iterdir()} - {"lock", f"{MANIFEST}.tmp"}:
        raise FileExistsError(f"path must be empty, got {folder}")


def _integers(ids: Tensor | Sequence[int]) -> Tensor:
    """A copy of ids, (n,) int64 on the CPU."""
    given = torch.as_tensor(ids).detach()
    if given.numel() and (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool):
        raise ValueError(f"ids must be integers, got {given.dtype}")
    return given.flatten().to("cpu", torch.int64, copy=True)


def _taken(values: list[Any], rows: Tensor) -> list[Any]:
    return [values[i] for i in rows.tolist()]


def _without_deleted(shard: Shard, new: NewShard) -> ShardInfo:
    keep = shard.kept
    coded = _codes.Coded(shard.rows[keep], shard.scales[keep])
    new.add([(coded, shard.sqnorms[keep])], shard.ids[keep], _taken(shard.metadata(), keep))
    return new.finish()


__all__ = ["GradientStore", "StoreError"]

"""A store of gradient rows on disk: made, appended to and thinned out; `_stored` reads and searches it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import IO, Any, Final

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels._files import StoreError, locked
from unlearn_kernels.influence import _codes
from unlearn_kernels.influence._codes import FORMATS, Format
from unlearn_kernels.influence._shards import (
    MANIFEST,
    Manifest,
    NewShard,
    Shard,
    ShardInfo,
    clear_unnamed,
    with_deleted,
)
from unlearn_kernels.influence._stored import Preconditioner, Progress, StoredRows

_SHARD_BYTES: Final = 1 << 28
_AT_ONCE: Final = 1 << 18  # numbers


class GradientStore(StoredRows):
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
        super().__init__(path)
        self._lock = lock
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

    def refresh(self) -> None:
        """Take in what was flushed since the store was opened; a writer, which knows of it, flushes."""
        if self.writable:
            self.flush()
        self._reload()

    @property
    def writable(self) -> bool:
        """Whether it is open for writing; it is not in a process that was forked from the one that opened it."""
        return self._lock is not None and not self._lock.closed

    def _writable(self) -> None:
        if not self.writable:
            raise StoreError(f"{self.path} is not open for writing: pass write=True to open")

    def append(
        self,
        rows: Tensor,
        ids: Tensor | Sequence[int] | None = None,
        metadata: Sequence[Any] | None = None,
        *,
        backend: Backend | None = None,
    ) -> None:
        """Take in rows; they are safe on disk after `flush`, or once 256 MB have come together.

        They are written at once, nothing of them is kept in memory but ids, norms and metadata.

        Args:
            rows: (n, width), floating-point, on any device.
            ids: (n,) integers; None: numbers on from the largest that was ever there, and from the rows ever written.
            metadata: n JSON values.
            backend: see `unlearn_kernels.use_backend`: of what makes integers and norms.

        Raises:
            ValueError: if something does not fit, or a row that becomes integers is not finite.
            BackendError: if `backend` cannot run.
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
        self._pending.add(self._encoded(rows.detach(), written, backend), ids, metadata)
        if self._pending.bytes >= _SHARD_BYTES:
            self.flush()

    def _encoded(
        self, rows: Tensor, first: int, backend: Backend | None
    ) -> Iterator[tuple[_codes.Coded, Tensor]]:
        """Some rows at a time, which are in cache when they are written; random numbers are by row, not by append."""
        step = max(1, _AT_ONCE // self.width)
        for begin in range(0, len(rows), step):
            number = first + begin if self._manifest.unbiased else None
            part = rows[begin : begin + step]
            yield _codes.encode(part, self.dtype, self._manifest.block, number, backend)

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


def _without_deleted(shard: Shard, new: NewShard) -> ShardInfo:
    keep = shard.kept
    coded = _codes.Coded(shard.rows[keep], shard.scales[keep])
    new.add([(coded, shard.sqnorms[keep])], shard.ids[keep], shard.metadata(keep))
    return new.finish()


__all__ = ["GradientStore", "Preconditioner", "Progress", "StoreError"]

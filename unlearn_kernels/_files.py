"""Files of stores on disk: raw little-endian arrays with checksums, and records that are replaced as a whole."""

import ctypes
import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any, Final
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

try:  # the same numbers by wider instructions
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

_AT_ONCE: Final = 1 << 20
_BEHIND: Final = 1 << 25  # bytes after which the disk is set to work, long before it has to be waited for
_WRITE: Final = 2  # SYNC_FILE_RANGE_WRITE


class StoreError(RuntimeError):
    """A folder is no store, one that is damaged, or one that does not fit what is asked of it."""


def _start_writing(handle: int, begin: int, size: int) -> None:
    """Lets a range of a file be written to disk, without waiting; where the system has no such call, later."""
    start = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if start is not None:
        start(handle, ctypes.c_int64(begin), ctypes.c_int64(size), _WRITE)


class Growing:
    """A file that is written bit by bit; `size` and `crc`, its CRC-32, are of what is in it so far."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self.size, self.crc, self._started = 0, 0, 0

    def add(self, chunk: Any) -> None:
        """Append bytes. Their checksum is taken while they are in cache."""
        view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
        while view:
            written = self._file.write(view[:_AT_ONCE])
            self.crc = crc32(view[:written], self.crc)
            self.size += written
            view = view[written:]
            if self.size - self._started >= _BEHIND:
                _start_writing(self._file.fileno(), self._started, self.size - self._started)
                self._started = self.size

    def back_to(self, size: int, crc: int) -> None:
        """Forget what came after `size` bytes, whose checksum is `crc`."""
        self._file.truncate(size)
        self._file.seek(size)
        self.size, self.crc, self._started = size, crc, min(self._started, size)

    def finish(self) -> list[int]:
        """Size and checksum; on disk when it returns. May be called again."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()
        return [self.size, self.crc]


def write(path: Path, *chunks: Any) -> list[int]:
    """Bytes and CRC-32 of what is written, on disk when it returns."""
    file = Growing(path)
    for chunk in chunks:
        file.add(chunk)
    return file.finish()


def sync_folder(folder: Path) -> None:
    """What was renamed in a folder is on disk when this returns."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bytes_of(x: Tensor) -> Any:
    """A CPU tensor's numbers, row by row."""
    return x.contiguous().view(torch.uint8).numpy().reshape(-1) if x.numel() else b""


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replaces a JSON file: whoever reads it sees the old one or the new one."""
    body = json.dumps(record, sort_keys=True)
    content = json.dumps({"crc32": crc32(body.encode()), "store": json.loads(body)}, sort_keys=True)
    temporary = path.with_name(f"{path.name}.tmp")
    write(temporary, content.encode())
    os.replace(temporary, path)
    sync_folder(path.parent)


def read_record(path: Path, noun: str, form: str, version: int) -> dict[str, Any]:
    """What `write_record` wrote, without its `format` and `version`.

    Raises:
        StoreError: if there is none, or it is damaged, foreign or of a later version.
    """
    if not path.is_file():
        raise StoreError(f"{path.parent} is no {noun}: it has no {path.name}")
    try:
        content = json.loads(path.read_bytes())
        record, crc = content["store"], content["crc32"]
        found, number = record.get("format"), record.get("version")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is not the manifest of a {noun}: {error}") from error
    if found != form:
        raise StoreError(f"{path} is not the manifest of a {noun}: format {found!r}")
    if number != version:
        raise StoreError(f"{path} has version {number}, this package reads {version}")
    if crc32(json.dumps(record, sort_keys=True).encode()) != crc:
        raise StoreError(f"{path} is damaged: its checksum is wrong")
    return {key: value for key, value in record.items() if key not in ("format", "version")}


def check_size(path: Path, size: int) -> None:
    """A file of a known size.

    Raises:
        StoreError: if it is missing or has another.
    """
    try:
        found = path.stat().st_size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{path} is missing") from error
    if found != size:
        raise StoreError(f"{path} is truncated or foreign: {found} bytes, {size} expected")


def check_bytes(path: Path, size: int, crc: int) -> None:
    """Reads a file and compares its checksum.

    Raises:
        StoreError: if it differs.
    """
    check_size(path, size)
    found = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            found = crc32(chunk, found)
    if found != crc:
        raise StoreError(f"{path} is damaged: its checksum is wrong")


def mapped(path: Path, kind: Any, shape: tuple[int, ...]) -> Tensor:
    """An array that is read through a memory map.

    Raises:
        StoreError: if the file is missing or has another size.
    """
    check_size(path, int(np.prod(shape)) * kind.itemsize)
    if 0 in shape:
        return torch.from_numpy(np.zeros(shape, kind))
    try:
        # Copy-on-write: torch takes no read-only memory, and nothing here writes.
        return torch.from_numpy(np.memmap(path, kind, "c", shape=shape))
    except (FileNotFoundError, NotADirectoryError) as error:  # taken away since its size was looked at
        raise StoreError(f"{path} is missing") from error


_locks: "WeakSet[IO[str]]" = WeakSet()


def _forget_locks() -> None:
    for lock in tuple(_locks):
        lock.close()


os.register_at_fork(after_in_child=_forget_locks)


def locked(folder: Path) -> IO[str]:
    """Keeps other writers away for as long as the file is open, which it is in no process that is forked from this one.

    Raises:
        StoreError: if another process writes.
    """
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise StoreError(f"{folder} is open for writing elsewhere") from error
    _locks.add(lock)
    return lock

"""The files of a gradient store: raw little-endian arrays in folders, and a manifest that is replaced as a whole."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from unlearn_kernels import _files
from unlearn_kernels._files import Growing, bytes_of, sync_folder, write
from unlearn_kernels.influence import _codes
from unlearn_kernels.influence._codes import Coded

FORMAT: Final = "unlearn_kernels.gradient_store"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
_METADATA: Final = "metadata.json"
_SHARD: Final = re.compile(r"\d{8}(\.tmp)?")
_SHARD_FILE: Final = re.compile(r"(rows|scales|ids|sqnorms|deleted-\d+)\.bin|metadata\.json")
_TYPES: Final[dict[str, tuple[Any, torch.dtype]]] = {
    "float32": (np.dtype("<f4"), torch.float32),
    "bfloat16": (np.dtype("<i2"), torch.bfloat16),
    "int8": (np.dtype("u1"), torch.uint8),
    "int4": (np.dtype("u1"), torch.uint8),
}


@dataclass
class ShardInfo:
    """A shard as the manifest has it. `files`: bytes and CRC-32 of each; `deleted`: the file of rows taken out."""

    name: str
    rows: int
    files: dict[str, list[int]]
    deleted: str | None = None
    deleted_rows: int = 0


@dataclass
class Manifest:
    """All that a store is, but its arrays. `rows_written` counts those that are gone; `next_id` is above all ids."""

    width: int
    dtype: str
    block: int
    unbiased: bool
    next_shard: int = 0
    rows_written: int = 0
    next_id: int = 0
    shards: list[ShardInfo] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replace the manifest: whoever opens the store sees the old one or the new one."""
        record = {"format": FORMAT, "version": VERSION, **asdict(self)}
        _files.write_record(folder / MANIFEST, record)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            StoreError: if there is none, or it is damaged, foreign or of a later version.
        """
        store = _files.read_record(folder / MANIFEST, "gradient store", FORMAT, VERSION)
        shards = [ShardInfo(**shard) for shard in store.pop("shards")]
        return Manifest(**store, shards=shards)


class NewShard:
    """A shard that is being written, in a folder of another name until `finish`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self._temporary = folder / f"{name}.tmp"
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        self._files = [Growing(self._temporary / file) for file in ("rows.bin", "scales.bin")]
        self._ids: list[Tensor] = []
        self._sqnorms: list[Tensor] = []
        self._metadata: list[str] = []
        self._rows, self._noted = 0, False
        self.next_id = 0  # above all ids
        self._finished: ShardInfo | None = None
        self.closed = False  # takes no more rows

    def __len__(self) -> int:
        return self._rows

    @property
    def bytes(self) -> int:
        """Of the rows, without what goes with them."""
        return self._files[0].size

    def add(self, parts: Iterable[tuple[Coded, Tensor]], ids: Tensor, metadata: Sequence[Any] | None) -> None:
        """Append rows, some and their squared norms after the other: all or, with an exception, none."""
        notes = ["null"] * len(ids) if metadata is None else [_as_json(n, x) for n, x in enumerate(metadata)]
        before, sqnorms = [(file.size, file.crc) for file in self._files], []
        try:
            for coded, norms in parts:
                for file, part in zip(self._files, coded, strict=True):
                    file.add(bytes_of(part))
                sqnorms.append(norms)
        except BaseException:
            for file, (size, crc) in zip(self._files, before, strict=True):
                file.back_to(size, crc)
            raise
        self._ids.append(ids)
        self._sqnorms += sqnorms
        self._rows += len(ids)
        self.next_id = max(self.next_id, int(ids.max()) + 1)
        self._metadata += notes
        self._noted |= any(x != "null" for x in notes)

    def finish(self) -> ShardInfo:
        """Bring it to disk under its name. After an exception it may be tried again."""
        if self._finished is not None:
            return self._finished
        self.closed = True
        rows, scales = (file.finish() for file in self._files)
        files = {
            "rows.bin": rows,
            "scales.bin": scales,
            "ids.bin": write(self._temporary / "ids.bin", *map(bytes_of, self._ids)),
            "sqnorms.bin": write(self._temporary / "sqnorms.bin", *map(bytes_of, self._sqnorms)),
        }
        if self._noted:
            content = f"[{', '.join(self._metadata)}]".encode()
            files[_METADATA] = write(self._temporary / _METADATA, content)
        sync_folder(self._temporary)
        os.rename(self._temporary, self.folder / self.name)
        self._finished = ShardInfo(self.name, len(self), files)
        sync_folder(self.folder)
        return self._finished


def _as_json(n: int, value: Any) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be JSON, got element {n}: {value!r:.99} ({error})") from error


def with_deleted(folder: Path, shard: ShardInfo, rows: Tensor) -> ShardInfo:
    """The shard with a new file of deleted rows; the one before stays for those who read it."""
    name = f"deleted-{len(rows)}.bin"
    files = {file: known for file, known in shard.files.items() if file != shard.deleted}
    files[name] = write(folder / shard.name / name, bytes_of(rows))
    sync_folder(folder / shard.name)
    return replace(shard, files=files, deleted=name, deleted_rows=len(rows))


class Shard:
    """A shard that is read through memory maps."""

    def __init__(self, folder: Path, info: ShardInfo, manifest: Manifest) -> None:
        self.folder, self.info = folder / info.name, info
        self.manifest, rows = manifest, info.rows
        kind, dtype = _TYPES[manifest.dtype]
        width = _codes.row_bytes(manifest.dtype, manifest.width) // kind.itemsize
        blocks = _codes.blocks(manifest.dtype, manifest.width, manifest.block)
        for name, (size, _) in info.files.items():
            _files.check_size(self.folder / name, size)
        self.rows = self._array("rows.bin", kind, (rows, width)).view(dtype)
        self.scales = self._array("scales.bin", np.dtype("<f4"), (rows, blocks))
        self.ids = self._array("ids.bin", np.dtype("<i8"), (rows,))
        self.sqnorms = self._array("sqnorms.bin", np.dtype("<f8"), (rows,))
        gone = self._array(info.deleted, np.dtype("<i8"), (info.deleted_rows,)) if info.deleted else None
        self.deleted = torch.zeros(0, dtype=torch.int64) if gone is None else gone.clone()
        if len(self.deleted) and not 0 <= int(self.deleted.min()) <= int(self.deleted.max()) < rows:
            raise _files.StoreError(
                f"{self.folder / str(info.deleted)} is damaged: it names rows beyond {rows}"
            )
        size = info.files.get(_METADATA, [0])[0]
        self._notes = self._array(_METADATA, np.dtype("u1"), (size,)) if size else None

    def _array(self, name: str, kind: Any, shape: tuple[int, ...]) -> Tensor:
        return _files.mapped(self.folder / name, kind, shape)

    @property
    def kept(self) -> Tensor:
        """The rows that are not deleted."""
        keep = torch.ones(self.info.rows, dtype=torch.bool)
        keep[self.deleted] = False
        return keep.nonzero().flatten()

    def numbers(self, rows: Tensor) -> Tensor:
        """Rows that are not deleted, counted without those that are."""
        return rows if self.info.deleted_rows == 0 else torch.searchsorted(self.kept, rows)

    def metadata(self, rows: Tensor) -> list[Any]:
        """What was given with each of these rows, or None."""
        if self._notes is None:
            return [None] * len(rows)
        notes = json.loads(bytes(self._notes.numpy()))
        return [notes[row] for row in rows.tolist()]

    def decoded(self, rows: slice | Tensor) -> Tensor:
        """Rows as float32."""
        coded = Coded(self.rows[rows], self.scales[rows])
        return _codes.decode(coded, self.manifest.dtype, self.manifest.width, self.manifest.block)

    def verify(self) -> None:
        """Compare every file with its checksum.

        Raises:
            StoreError: if one differs.
        """
        for name, (size, crc) in self.info.files.items():
            _files.check_bytes(self.folder / name, size, crc)


def read_store(folder: Path) -> tuple[Manifest, list[Shard]]:
    """The manifest of a folder and the shards that it names.

    Raises:
        StoreError: if the folder is no store, or a file is missing, truncated or foreign.
    """
    while True:
        manifest = Manifest.read(folder)
        try:
            return manifest, [Shard(folder, info, manifest) for info in manifest.shards]
        except _files.StoreError:
            # A writer may have compacted the store since its manifest was read.
            if Manifest.read(folder) == manifest:
                raise


def clear_unnamed(folder: Path, manifest: Manifest) -> None:
    """Removes shards that a killed writer left without naming them in the manifest; nobody else's folders."""
    named = {info.name for info in manifest.shards}
    for child in folder.iterdir():
        if child.name not in named and _is_shard(child):
            shutil.rmtree(child)


def _is_shard(folder: Path) -> bool:
    named = _SHARD.fullmatch(folder.name) is not None and folder.is_dir()
    return named and all(_SHARD_FILE.fullmatch(file.name) for file in folder.iterdir())

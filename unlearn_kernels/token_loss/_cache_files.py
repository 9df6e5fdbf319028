"""The files of a reference cache: a manifest, shards of samples, and the reference's head."""

import json
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from unlearn_kernels import _files

Key = int | str
FORMAT: Final = "unlearn_kernels.reference_cache"
VERSION: Final = 1
MANIFEST: Final = "manifest.json"
HEAD: Final = "head"
_TYPES: Final[dict[str, tuple[Any, torch.dtype]]] = {
    "float32": (np.dtype("<f4"), torch.float32),
    "float64": (np.dtype("<f8"), torch.float64),
    "bfloat16": (np.dtype("<i2"), torch.bfloat16),
    "float16": (np.dtype("<f2"), torch.float16),
    "int64": (np.dtype("<i8"), torch.int64),
}
Files = dict[str, list[int]]  # bytes and CRC-32 of each


@dataclass
class Array:
    """An array as the manifest has it."""

    dtype: str
    shape: list[int]


@dataclass
class ShardInfo:
    """A shard as the manifest has it: `samples` samples of `tokens` tokens that count in all."""

    name: str
    samples: int
    tokens: int
    files: Files


@dataclass
class Manifest:
    """All that a cache is, but its arrays. `dtype`: of likelihoods; `width`, `states`: of hidden states."""

    fingerprint: str
    with_tokens: bool
    with_hidden: bool
    dtype: str | None = None
    width: int = 0
    states: str | None = None
    head: dict[str, Any] = field(default_factory=dict)
    head_files: Files = field(default_factory=dict)
    next_shard: int = 0
    shards: list[ShardInfo] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        """Replace the manifest as a whole."""
        _files.write_record(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **asdict(self)})

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """The manifest of a folder.

        Raises:
            StoreError: if there is none, or it is damaged, foreign or of a later version.
        """
        record = _files.read_record(folder / MANIFEST, "reference cache", FORMAT, VERSION)
        shards = [ShardInfo(**shard) for shard in record.pop("shards")]
        return Manifest(**record, shards=shards)


@dataclass
class Sample:
    """What is kept of a sample: of each token that counts its likelihood and, if wanted, its hidden states."""

    key: Key
    digest: int  # of the labels that count
    inputs: int  # of the tokens that the model saw
    nll: Tensor  # (n,)
    hidden: Tensor | None  # (n, d)


def name_of(dtype: torch.dtype) -> str:
    """A dtype as the manifest has it."""
    return str(dtype).removeprefix("torch.")


def digest_of(labels: Tensor) -> int:
    """A checksum of the labels that count, in their order."""
    return zlib.crc32(_files.bytes_of(labels.to("cpu", torch.int64)))


def write_folder(folder: Path, name: str, contents: dict[str, list[Any]]) -> Files:
    """A new folder of files, complete on disk under its name when this returns."""
    temporary = folder / f"{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    files = {file: _files.write(temporary / file, *chunks) for file, chunks in contents.items()}
    _files.sync_folder(temporary)
    # A writer that was killed before the manifest named it may have left one.
    shutil.rmtree(folder / name, ignore_errors=True)
    os.rename(temporary, folder / name)
    _files.sync_folder(folder)
    return files


def write_shard(folder: Path, manifest: Manifest, samples: list[Sample]) -> ShardInfo:
    """A new shard of samples."""
    lengths = torch.tensor([len(s.nll) for s in samples])
    sums = torch.stack([s.nll.sum(dtype=torch.float64) for s in samples])
    contents: dict[str, list[Any]] = {
        "keys.json": [json.dumps([s.key for s in samples]).encode()],
        "lengths.bin": [_files.bytes_of(lengths)],
        "digests.bin": [_files.bytes_of(torch.tensor([s.digest for s in samples]))],
        "inputs.bin": [_files.bytes_of(torch.tensor([s.inputs for s in samples]))],
        "sums.bin": [_files.bytes_of(sums)],
    }
    if manifest.with_tokens:
        contents["nll.bin"] = [_files.bytes_of(s.nll) for s in samples]
    if manifest.with_hidden:
        contents["hidden.bin"] = [_files.bytes_of(s.hidden) for s in samples if s.hidden is not None]
    name = f"{manifest.next_shard:08d}"
    manifest.next_shard += 1
    return ShardInfo(name, len(samples), int(lengths.sum()), write_folder(folder, name, contents))


class Shard:
    """A shard that is read through memory maps."""

    def __init__(self, folder: Path, info: ShardInfo, manifest: Manifest) -> None:
        self.folder, self.info = folder / info.name, info
        for name, (size, _) in info.files.items():
            _files.check_size(self.folder / name, size)
        n, tokens = info.samples, info.tokens
        self.keys: list[Key] = json.loads((self.folder / "keys.json").read_bytes())
        self.lengths = array(self.folder / "lengths.bin", "int64", n)
        self.digests = array(self.folder / "digests.bin", "int64", n)
        known = "inputs.bin" in info.files  # not written at first
        self.inputs = array(self.folder / "inputs.bin", "int64", n) if known else torch.full((n,), -1)
        self.sums = array(self.folder / "sums.bin", "float64", n)
        self.ends = self.lengths.cumsum(0)
        self.nll = array(self.folder / "nll.bin", manifest.dtype, tokens) if manifest.with_tokens else None
        self.hidden = (
            array(self.folder / "hidden.bin", manifest.states, tokens, manifest.width)
            if manifest.with_hidden
            else None
        )

    def tokens(self, row: int) -> slice:
        """Where the tokens of a sample lie."""
        end = int(self.ends[row])
        return slice(end - int(self.lengths[row]), end)


def array(path: Path, dtype: str | None, *shape: int) -> Tensor:
    """An array of a type that the manifest names."""
    kind, torch_dtype = _TYPES[dtype or "float32"]
    return _files.mapped(path, kind, shape).view(torch_dtype)


def write_head(folder: Path, manifest: Manifest, W: Tensor, bias: Tensor | None) -> None:
    """The reference's head, beside the shards."""
    parts = {"weight": W, "bias": bias}
    present = {name: x.detach().cpu() for name, x in parts.items() if x is not None}
    contents = {f"{name}.bin": [_files.bytes_of(x)] for name, x in present.items()}
    manifest.head_files = write_folder(folder, HEAD, contents)
    manifest.head = {name: asdict(Array(name_of(x.dtype), list(x.shape))) for name, x in present.items()}


def read_head(folder: Path, manifest: Manifest) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the reference's head, memory-mapped."""
    found = {
        name: array(folder / HEAD / f"{name}.bin", x["dtype"], *x["shape"])
        for name, x in manifest.head.items()
    }
    return found["weight"], found.get("bias")

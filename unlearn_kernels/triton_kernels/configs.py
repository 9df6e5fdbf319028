"""Tiles that were measured to be best on a device: configs/<device>.json in this folder, read when first asked for.

Where there is no file, or a file says nothing of a case, `common.tile_for` computes the tile. Nothing is tuned while
programs run; `python -m benchmarks.tune --write` measures on the device at hand and writes the file.
"""

import functools
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

FOLDER: Final = Path(__file__).parent / "configs"
FIELDS: Final = ("rows", "cols", "depth", "num_warps", "num_stages")
Limits = tuple[int, int, int, int, int]
_trial: dict[str, Limits] = {}


def key(dot: str, accumulators: int) -> str:
    """What a file calls products of one type in programs with so many accumulators: "bf16 x 2"."""
    return f"{dot} x {accumulators}"


def file_of(device: str) -> Path:
    """The file of a device by the name that CUDA gives it."""
    return FOLDER / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


@functools.cache
def device_name() -> str | None:
    """The name of this process's GPU, or None."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


@functools.cache
def table_of(device: str) -> Mapping[str, Limits]:
    """The measured tiles of a device, by `key`; none where it has no file.

    Raises:
        ValueError: if the file's entry is not five numbers that a launch can take.
    """
    path = file_of(device)
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())["tiles"]
    return {name: checked(f"{path.name}: {name}", tuple(values)) for name, values in content.items()}


def checked(name: str, limits: tuple[int, ...]) -> Limits:
    """The five numbers of a tile.

    Raises:
        ValueError: if they are not, or a block is no power of two from 16 on.
    """
    if len(limits) != len(FIELDS):
        raise ValueError(f"{name} must have {', '.join(FIELDS)}, got {limits}")
    rows, cols, depth, num_warps, num_stages = limits
    if any(size < 16 or size & (size - 1) for size in (rows, cols, depth)):
        raise ValueError(
            f"{name} must have rows, cols and depth that are powers of two from 16 on, got {limits}"
        )
    if num_warps not in (1, 2, 4, 8, 16) or not 1 <= num_stages <= 8:
        raise ValueError(f"{name} must have 1 to 16 warps, a power of two, and 1 to 8 stages, got {limits}")
    return rows, cols, depth, num_warps, num_stages


def measured(dot: str, accumulators: int) -> Limits | None:
    """The largest tile for products of that type on this device, or None."""
    name = key(dot, accumulators)
    if name in _trial:
        return _trial[name]
    device = device_name()
    return table_of(device).get(name) if device is not None else None


@contextmanager
def trial(tiles: Mapping[str, tuple[int, ...]]) -> Iterator[None]:
    """Inside the block these tiles are used, whatever the files say: for whoever measures them."""
    before = dict(_trial)
    _trial.update({name: checked(name, limits) for name, limits in tiles.items()})
    try:
        yield
    finally:
        _trial.clear()
        _trial.update(before)

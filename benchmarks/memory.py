"""Peak extra memory of one call.

On the CPU it is the growth of the process's resident set during the call: the high-water mark that the
kernel keeps (`VmHWM`), reset by writing 5 to `/proc/self/clear_refs`, minus the resident set just before,
minus the tensors that the call returns and that were not there before. Free heap pages are given back first
(`malloc_trim`), so that memory which the allocator kept from earlier calls counts again. Inputs are
resident and libraries have been warmed (at a small shape, if the case has one), so thread pools and
generated code do not count while workspaces that depend on the size do. Linux counts resident pages per
core in batches: figures below about 0.5 MB are noise. Elsewhere than on Linux the answer is None.

On CUDA it is the growth of `torch.cuda.max_memory_allocated`, minus what the call returns.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Measured:
    """What a call returned, how long it took, and the memory it needed."""

    output: Any
    seconds: float
    peak_bytes: int | None
    output_bytes: int


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the system; whether that worked.

    A stand-in for a caching allocator. By default every large temporary is a fresh mapping whose pages are
    zeroed on first touch, which makes methods with temporaries several times slower than they are inside a
    program that reuses its memory. Our own kernels need none of it, so the default would flatter them.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(_M_MMAP_MAX, 0)) and bool(libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):
        return False


def release_freed_memory() -> None:
    """Give free heap pages back to the system."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def storages(value: Any) -> dict[int, int]:
    """Address and size in bytes of every tensor or array storage inside nested containers."""
    return {address: size for address, size in _storages(value)}


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage.data_ptr(), storage.nbytes()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _storages(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
    elif dataclasses.is_dataclass(value):
        yield from _storages(vars(value))
    elif hasattr(value, "__array_interface__"):
        yield value.ctypes.data, value.nbytes


def measure(run: Callable[[], Any], held: Any, device: str = "cpu") -> Measured:
    """Call `run` once. What comes back of `held`, which was in memory before, is no output."""
    known = storages(held)
    before, peak = _gauge(device)
    started = time.perf_counter()
    output = run()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    top = peak()
    output_bytes = sum(size for address, size in storages(output).items() if address not in known)
    growth = None if before is None or top is None else max(0, top - before - output_bytes)
    return Measured(output, seconds, growth, output_bytes)


def _gauge(device: str) -> tuple[int | None, Callable[[], int | None]]:
    """Bytes in use now, and a function that tells the highest use since."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated
    release_freed_memory()
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return None, lambda: None
    return _status("VmRSS"), lambda: _status("VmHWM")


def _status(key: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None

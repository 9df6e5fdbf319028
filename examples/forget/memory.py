"""Peak memory of a stretch of code: of the process on the CPU, of PyTorch's allocator on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMeter:
    """`start()`, run something, `extra()`: the most bytes held at once beyond what was held at the start.

    Without `/proc/self/clear_refs` (not Linux) the peak is the whole life's, and `extra()` a lower bound.
    """

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        self.base = self.seen = 0

    def start(self) -> None:
        gc.collect()
        _return_freed_memory()
        self._reset()
        self.base, self.seen = self._peak(), 0

    def extra(self) -> int:
        return max(self.seen, self._peak()) - self.base

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside does not count."""
        self.seen = max(self.seen, self._peak())
        try:
            yield
        finally:
            gc.collect()
            _return_freed_memory()
            self._reset()

    def _reset(self) -> None:
        """Set the peak back to what is held now."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        elif _CLEAR.exists():
            _CLEAR.write_text("5")

    def _peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if _CLEAR.exists():
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(line.split()[1]) * 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _return_freed_memory() -> None:
    """Have glibc give back what earlier work freed, so that using it again counts again."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

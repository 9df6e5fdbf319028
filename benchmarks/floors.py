"""What the machine can do at best, measured in the same run as the kernels: multiply-adds and memory traffic.

Shared machines drift, so a `Floor` is sampled in every round between the providers, and the best rate seen
while a case ran is that case's floor.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.registry import Case

_STREAM_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
_GEMM_SIZE = {"cpu": 1024, "cuda": 8192}
_FMA_SECONDS = 0.02
_KERNEL_FMA, _DENSE_FMA = "multiply-add loop", "best dense GEMM"


def kernel_isa() -> str | None:
    """The instruction set that the kernels use here, or None when they are not built."""
    try:
        importlib.import_module("unlearn_kernels")
        return str(torch.ops.unlearn_kernels.isa())
    except (ImportError, AttributeError):
        return None


class Floor:
    """Best rates so far on one device at one thread count, in operations and bytes per second.

    `half` is the rate of 16-bit products where the device has units of their own for them and it was measured.
    """

    def __init__(self, device: str, threads: int) -> None:
        self.device = device
        self.threads = threads
        elements = _STREAM_BYTES[device] // 4
        self._x = torch.full((elements,), 1.0, device=device)
        self._y = torch.full((elements,), 1.0, device=device)
        self._fma_loop = _fma_loop() if device == "cpu" else None
        self._gemms = () if self._fma_loop else _gemms(device)
        self.reset()

    def reset(self) -> None:
        """Forget the rates, before the next case."""
        self.rates = dict.fromkeys(("fma", "half", "axpy", "read"), 0.0)

    @property
    def fma_source(self) -> str:
        """Where the multiply-add rate comes from."""
        return _KERNEL_FMA if self._fma_loop else _DENSE_FMA

    def sample(self) -> None:
        """Measure each rate once and keep the best."""
        if self._fma_loop:
            self._keep("fma", self._fma_loop(self.threads))
        for name, flops, gemm in self._gemms:
            self._keep(name, flops / self._time(gemm))
        size = self._x.nbytes
        self._keep("axpy", 3 * size / self._time(lambda: self._x.add_(self._y, alpha=1e-6)))
        self._keep("read", size / self._time(lambda: self._x.sum()))

    def seconds(self, case: Case) -> float:
        """The least time that the case's arithmetic and its memory traffic allow."""
        if not self.rates["read"]:
            self.sample()
        half = case.dtype.itemsize == 2 and self.rates["half"]
        return max(case.flops / (half or self.rates["fma"]), case.bytes / self.rates[case.bandwidth])

    def record(self) -> dict[str, Any]:
        """The rates in GFLOP/s and GB/s, for a result file."""
        return {
            "threads": self.threads,
            "fma_gflops": round(self.rates["fma"] / 1e9, 2),
            "fma_source": self.fma_source,
            "half_gflops": round(self.rates["half"] / 1e9, 2) or None,
            "axpy_gbs": round(self.rates["axpy"] / 1e9, 2),
            "read_gbs": round(self.rates["read"] / 1e9, 2),
        }

    def _keep(self, name: str, rate: float) -> None:
        self.rates[name] = max(self.rates[name], rate)

    def _time(self, run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def _fma_loop() -> Callable[[int], float] | None:
    """Rate of fp32 multiply-adds out of registers on so many threads, in FLOP/s, if the build can tell it."""
    try:
        host = importlib.import_module("unlearn_kernels._host")
    except ImportError:
        return None
    return lambda threads: float(host.fma_peak(seconds=_FMA_SECONDS, threads=threads))


def _gemms(device: str) -> tuple[tuple[str, int, Callable[[], Any]], ...]:
    """Square products by the libraries; on a GPU also in bfloat16, whose units are others."""
    n = _GEMM_SIZE[device]
    a = torch.ones(n, n, device=device)
    found: list[tuple[str, int, Callable[[], Any]]] = [("fma", 2 * n**3, lambda: a @ a)]
    if device == "cuda":
        narrow = a.bfloat16()
        found.append(("half", 2 * n**3, lambda: narrow @ narrow))
    elif torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        found.append(("fma", 2 * n**3, lambda: linear(a, a, None, "none", [], "")))
    return tuple(found)

"""Where a number was measured: the machine, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import unlearn_kernels

_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("torch", "numpy", "triton")
_PEERS = ("opacus", "torchjd", "traker", "faiss-cpu", "liger-kernel", "transformers", "diffusers")
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Python, torch and whatever of the stack and of the peers is installed."""
    found = {name: version_of(name) for name in _PACKAGES + _PEERS}
    own = {"unlearn_kernels": unlearn_kernels.__version__, "python": platform.python_version()}
    return own | {name: v for name, v in found.items() if v}


def commit() -> str | None:
    """The commit of the source tree, with `+` when the tree differs from it in more than results.

    Outside a repository it is what `BENCHMARK_COMMIT` says, or None.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(_ROOT), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            "+" if git("status", "--porcelain", "--", ".", ":!benchmarks/results") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARK_COMMIT")


def cpu() -> dict[str, Any]:
    """Model, family, cores, caches' size and vector instruction sets of the CPU."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "family": " ".join(info[key] for key in ("cpu family", "model", "stepping") if key in info),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cache": info.get("cache size"),
        "flags": [flag for flag in _ISA_FLAGS if flag in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def isa() -> str:
    """The instruction set that our kernels use, or that torch uses when ours are not built."""
    from benchmarks.floors import kernel_isa

    return kernel_isa() or f"torch {torch.backends.cpu.get_cpu_capability()}"


def describe(device: str) -> dict[str, Any]:
    """The record that a result file opens with."""
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "commit": commit(),
        "machine": name(device),
        "isa": isa(),
        "versions": versions(),
        "cpu": cpu(),
        "load": [round(x, 2) for x in os.getloadavg()],
    }
    if device == "cuda":
        record["capability"] = list(torch.cuda.get_device_capability())
        record["versions"]["cuda"] = torch.version.cuda or ""
    return record


def name(device: str) -> str:
    """The machine in one line."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    facts = cpu()
    return f"{facts['model']} (family {facts['family']}), {facts['cores']} cores"


def slug(device: str) -> str:
    """The machine's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name(device).lower()).strip("-")

"""What `python -m unlearn_kernels` tells: what is installed, built and running here, and why not the rest."""

import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch

from unlearn_kernels import _env, _loader, _selfcheck
from unlearn_kernels._backends import BACKENDS, REGISTRY, Operator

_PACKAGE: Final = Path(__file__).parent
_GPU_BACKENDS: Final = ("triton", "cuda")
NEVER_RUN: Final = "compiled, not run"


def collect() -> dict[str, Any]:
    """The whole report, as plain data."""
    return {
        "versions": _versions(),
        "cuda": _cuda(),
        "build": _build(),
        "extensions": _extensions(),
        "cpu": _cpu(),
        "operators": operators(),
        "environment": _environment(),
        "self_check": _selfcheck.run(),
    }


def healthy(report: Mapping[str, Any]) -> bool:
    """Whether the C++ kernels are there and every self-check passed."""
    outcomes = [o for backends in report["self_check"].values() for o in backends.values()]
    return report["extensions"]["_C"] == "loaded" and all(o == _selfcheck.PASSED for o in outcomes)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    packages = {name: _installed(name) for name in ("torch", "triton", "numpy")}
    return {
        "unlearn_kernels": _installed("unlearn-kernels"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **packages,
    }


def _output(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cuda() -> dict[str, str | None]:
    home = os.environ.get("CUDA_HOME")
    release = re.search(r"release ([\d.]+)", _output(f"{home}/bin/nvcc" if home else "nvcc", "--version"))
    device = None
    if torch.cuda.is_available():
        capability = "".join(map(str, torch.cuda.get_device_capability()))
        device = f"{torch.cuda.get_device_name()} (sm_{capability})"
    return {
        "torch built with": torch.version.cuda,
        "device": device,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
        "nvcc": release[1] if release else None,
        "CUDA_HOME": home,
    }


def _host() -> Any:
    """The host module, or None where it is not built."""
    try:
        return import_module("unlearn_kernels._host")
    except ImportError:
        return None


def _build() -> dict[str, Any] | None:
    """The record that setup.py left, joined with what the compiler itself left in the host module."""
    path, host = _PACKAGE / "_build_info.json", _host()
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record | ({"host": host.build_record()} if host else {})


def _extensions() -> dict[str, str]:
    states = {name: _loader.load_errors.get(name, "loaded") for name in ("_C", "_C_cuda", "_host")}
    record = _build()
    if not _loader.have_C:
        states["_C_cuda"] = "not tried, because _C is missing"
    elif not _loader.have_C_cuda and record and "skipped" in record["cuda"]:
        states["_C_cuda"] = f"not built ({record['cuda']})"
    if _host() is None:
        states["_host"] = f"not built here; in the source folder run: {_loader.BUILD_COMMAND}"
    return states


def _cpu() -> dict[str, Any]:
    host = _host()
    runnable = [name for name, runs in host.isa_variants().items() if runs] if host else []
    return {
        "features": sorted(name for name, found in host.cpu_features().items() if found) if host else [],
        "isa that run here": runnable,
        "isa used": torch.ops.unlearn_kernels.isa() if _loader.have_C else None,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def operators() -> dict[str, dict[str, dict[str, str | None]]]:
    """Each operator's backends: why one cannot run here (None: it can), and where a GPU path has run."""
    evidence = gpu_runs()
    return {
        name: {backend: _cell(operator, backend, evidence) for backend in BACKENDS}
        for name, operator in REGISTRY.items()
    }


def _cell(operator: Operator, backend: str, evidence: Mapping[tuple[str, str], str]) -> dict[str, str | None]:
    impl = operator.impls.get(backend)
    if impl is None:
        return {"problem": "no such implementation", "hardware": None}
    seen = evidence.get((operator.name, backend), NEVER_RUN) if backend in _GPU_BACKENDS else None
    return {"problem": impl.reason_unavailable(), "hardware": seen}


def gpu_runs() -> dict[tuple[str, str], str]:
    """Device, date and commit at which an operator's GPU path ran and was right, from the benchmark results."""
    runs: dict[tuple[str, str], str] = {}
    for path in _result_files():
        for row in json.loads(path.read_text()).get("rows", []):
            if (row["device"], row["role"], row["status"]) == ("cuda", "ours", "ok"):
                backend = next((b for b in _GPU_BACKENDS if b in row["provider"]), "triton")
                seen = f"{row['machine']}, {row['date'][:10]}, {str(row['commit'])[:7]}"
                runs |= {(op, backend): seen for op in row["ops"]}
    return runs


def _result_files() -> list[Path]:
    """The results that the build packed, or those of the source tree."""
    packed, source = _PACKAGE / "_results", _PACKAGE.parent / "benchmarks" / "results"
    return sorted((packed if packed.is_dir() else source).glob("*.json"))


def _environment() -> dict[str, dict[str, Any]]:
    return {
        name: {"value": _env.get(name), "set": name in os.environ, "default": variable.default}
        for name, variable in _env.VARIABLES.items()
    }

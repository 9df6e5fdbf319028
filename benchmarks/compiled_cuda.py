"""What nvcc makes of the kernels in csrc/cuda, with no GPU present; `benchmarks.compiled` keeps it beside Triton's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
SOURCES: Final = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TARGETS: Final = {"sm_80": "80", "sm_90a": "90a", "sm_100": "100"}
SHARED_LIMIT: Final = 48 * 1024  # bytes that a block has without asking for more


class Compiled(NamedTuple):
    """What ptxas says of a kernel. The stack holds what registers do not: spills, and arrays of variable index."""

    registers: int
    stack_bytes: int
    shared_bytes: int


Table = dict[str, dict[str, Compiled]]


def toolkit() -> Path | None:
    """The CUDA toolkit's folder; an nvcc without headers beside it is a shim."""
    found = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    homes = [Path(home) for home in named if home] + ([Path(found).resolve().parents[1]] if found else [])
    for home in homes:
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            return home
    return None


def release(home: Path) -> str:
    """The toolkit's release, such as "13.0"."""
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", text)
    assert found is not None
    return found[1]


def compile_all(home: Path, sources: Sequence[Path] = SOURCES) -> Table:
    """Every kernel for every target, two files at a time."""
    table: Table = {}
    with ThreadPoolExecutor(2) as pool:
        for log in pool.map(lambda source: _log(home, source), sources):
            for name, target, made in _parsed(log):
                table.setdefault(name, {})[target] = made
    return table


def _log(home: Path, source: Path) -> str:
    """What ptxas prints, with the names of C++."""
    code = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in TARGETS.values()]
    with tempfile.TemporaryDirectory() as folder:
        command = [home / "bin/nvcc", "-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", *code, "-Xptxas", "-v"]
        command += ["-c", source, "-o", Path(folder) / "kernels.o"]
        environment = {**os.environ, "CUDA_HOME": str(home)}
        run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode != 0:
        raise RuntimeError(f"{source.name}:\n{run.stderr}")
    return subprocess.run(["c++filt"], input=run.stderr, capture_output=True, text=True, check=True).stdout


def _parsed(log: str) -> Iterator[tuple[str, str, Compiled]]:
    pattern = re.compile(
        r"Compiling entry function '([^'\n]*)' for '(sm_\w+)'(.*?)(?=Compiling entry|\Z)", re.DOTALL
    )
    for function, target, rest in pattern.findall(log):
        inside = re.search(r"run_blocks<uk::cuda::(.*?) ?>\(", function)
        numbers = [re.search(p, rest) for p in (r"Used (\d+) reg", r"(\d+) bytes stack", r"(\d+) bytes smem")]
        registers, stack, shared = (int(n[1]) if n else 0 for n in numbers)
        yield inside[1] if inside else function, target, Compiled(registers, stack, shared)

"""What compilers made of every GPU kernel, kept beside the results: `python -m benchmarks.compiled [--write]`.

Triton's kernels, and those in csrc/cuda where there is a CUDA toolkit; without one their part of the file stays.
Without `--write` it compares with the file and tells what became worse; the status is then 1.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

from benchmarks import compiled_cuda
from unlearn_kernels.triton_kernels import aot

FILE = Path(__file__).parent / "results" / "compiled.json"
CAPABILITIES = tuple(aot.SHARED_LIMITS)
Table = Mapping[str, Mapping[str, Mapping[str, int]]]


def compile_all(capabilities: Sequence[int] = CAPABILITIES) -> Table:
    """Every ahead-of-time case for every compute capability, on all cores."""
    names = [case.name for case in aot.cases()]
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun = {n: {c: pool.submit(aot.compile_named, n, c) for c in capabilities} for n in names}
        return {n: {f"sm_{c}": f.result()._asdict() for c, f in of.items()} for n, of in begun.items()}


def recorded() -> dict[str, Any]:
    """The file: the version of Triton and its table."""
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def losses(name: str, gpu: str, before: aot.Compiled, now: aot.Compiled) -> Iterator[str]:
    """What a kernel had and has no more."""
    if now.spilled_bytes > max(before.spilled_bytes, aot.PARKED_BYTES):
        yield f"{name} on {gpu} spills {now.spilled_bytes} B, {before.spilled_bytes} B before"
    for kind in aot.TENSOR_CORES:
        if getattr(before, kind) and not getattr(now, kind):
            yield f"{name} on {gpu} has lost its {aot.TENSOR_CORES[kind]} instructions"


def missing(table: Table) -> str | None:
    """Why a table is not that of the kernels, or None."""
    names = {case.name for case in aot.cases()}
    odd = sorted(names ^ set(table))
    return (
        f"{FILE.name} is not of these kernels ({', '.join(odd)}); run benchmarks.compiled --write"
        if odd
        else None
    )


def of_cuda() -> dict[str, Any]:
    """The toolkit's release and its table; what is recorded where there is no toolkit."""
    home = compiled_cuda.toolkit()
    if home is None:
        return {key: recorded()[key] for key in ("nvcc", "cuda")}
    table = compiled_cuda.compile_all(home)
    rows = {name: {gpu: made._asdict() for gpu, made in of.items()} for name, of in table.items()}
    return {"nvcc": compiled_cuda.release(home), "cuda": rows}


def write(table: Table, cuda: Mapping[str, Any]) -> None:
    """Replace the file, one kernel a line."""

    def lines(rows: Table) -> str:
        return ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))

    FILE.write_text(
        f'{{"triton": "{triton.__version__}", "kernels": {{\n{lines(table)}\n}},\n'
        f'"nvcc": "{cuda["nvcc"]}", "cuda": {{\n{lines(cuda["cuda"])}\n}}}}\n'
    )


def _compared(table: Table) -> int:
    before = recorded()["kernels"]
    told = [missing(before)] if missing(before) else []
    for name in set(before) & set(table):
        for gpu in before[name]:
            told += losses(name, gpu, aot.Compiled(**before[name][gpu]), aot.Compiled(**table[name][gpu]))
    print("\n".join(filter(None, told)) or f"{len(table)} kernels: nothing became worse")
    return int(bool(told))


if __name__ == "__main__":
    made = compile_all()
    if sys.argv[1:] == ["--write"]:
        write(made, of_cuda())
    else:
        sys.exit(_compared(made))

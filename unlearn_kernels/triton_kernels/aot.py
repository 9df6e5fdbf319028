"""Compiles kernels to machine code for given GPUs, with no GPU present, and reports what they take.

Each family lists its kernels in a table `AOT` of `AotCase`; `cases()` collects them. Not for the interpreter.
"""

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unlearn_kernels.triton_kernels.common import launch_options

# Shared memory that one block may use, in bytes (CUDA C++ programming guide, "compute capabilities").
SHARED_LIMITS: Final = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES: Final = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16, "fp64": tl.float64}
# ptxas may park a scalar outside the loops to reach an occupancy that it likes; more than that is a spill.
PARKED_BYTES: Final = 16
# The instructions of the tensor cores, in the order in which GPUs learnt them.
TENSOR_CORES: Final = {"mma": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True)
class AotCase:
    """One specialisation of one kernel.

    Attributes:
        kernel: the `@triton.jit` function.
        pointers: the element type of each pointer argument ("fp32", "bf16", "i64", ...); 16-byte aligned.
        constants: `tl.constexpr` arguments, and any other (a stride of 1) that a launch would specialise on.
        scalars: types of scalar arguments that are not "i64".
        num_warps: as the launcher passes it.
        num_stages: as the launcher passes it.
        multiples_of_16: integer arguments that are divisible by 16, as aligned sizes and strides are.
        spills: whether the kernel may spill registers.
        tensor_cores: whether it must contain tensor-core instructions.
        fusion: as the launcher passes it.
    """

    kernel: Any
    pointers: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    multiples_of_16: tuple[str, ...] = ()
    spills: bool = False
    tensor_cores: bool = False
    fusion: bool = True

    @property
    def name(self) -> str:
        """The kernel, its pointer types and the numbers among its constants."""
        types = dict.fromkeys(self.pointers.values())
        numbers = (f"{v:g}" for v in self.constants.values() if isinstance(v, int | float))
        return "-".join((self.kernel.__name__, *types, "x".join(numbers)))


class Compiled(NamedTuple):
    """What the compiler made of a kernel; the last three are numbers of instructions."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    mma: int
    wgmma: int
    tcgen05: int

    @property
    def tensor_cores(self) -> int:
        """Instructions of tensor cores, of any generation."""
        return self.mma + self.wgmma + self.tcgen05


def cases() -> Iterator[AotCase]:
    """Every case of every module of this package."""
    package = importlib.import_module("unlearn_kernels.triton_kernels")
    for found in sorted(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")):
        yield from getattr(importlib.import_module(found), "AOT", ())


def source(case: AotCase) -> ASTSource:
    """The kernel with types and constants put in."""
    names = case.kernel.arg_names
    unknown = {*case.pointers, *case.constants, *case.scalars, *case.multiples_of_16} - set(names)
    if unknown:
        raise ValueError(f"{case.kernel.__name__} has no arguments {', '.join(sorted(unknown))}")
    signature = {name: _type(case, name) for name in names}
    aligned = {*case.pointers, *case.multiples_of_16}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned}
    return ASTSource(case.kernel, signature, dict(case.constants), attributes)


def _type(case: AotCase, name: str) -> str:
    if name in case.constants:
        return "constexpr"
    if name in case.pointers:
        return f"*{case.pointers[name]}"
    return case.scalars.get(name, "i64")


def compile_named(name: str, capability: int) -> Compiled:
    """Compiles the case of that name; a table of cases cannot cross to another process, its names can."""
    return compile_for(next(case for case in cases() if case.name == name), capability)


def compile_for(case: AotCase, capability: int) -> Compiled:
    """Compiles for compute capability 80, 90, 100, ..."""
    options = launch_options(case.num_warps, case.num_stages, case.fusion)
    return measured(triton.compile(source(case), target=GPUTarget("cuda", capability, 32), options=options))


def measured(kernel: Any) -> Compiled:
    """What a compiled kernel takes."""
    usage, ptx = _usage(kernel.asm["cubin"]), kernel.asm["ptx"]
    counts = (len(re.findall(rf"\b{re.escape(name)}\b", ptx)) for name in TENSOR_CORES.values())
    return Compiled(usage["REG"], usage["STACK"] + usage["LOCAL"], kernel.metadata.shared, *counts)


def _usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of the kernel in a cubin, read by the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}

"""Triton launchers on a machine without a GPU: everything up to the launch.

Ahead-of-time cases are written by hand; here the launchers themselves say what a call compiles, with the integer
widths, the alignments and the constants that its arguments have. Not for the interpreter.
"""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from unlearn_kernels import _ops
from unlearn_kernels.triton_kernels.aot import Compiled, measured


class Launch(NamedTuple):
    """What one launch compiles."""

    module: str
    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]

    def compile_for(self, capability: int) -> Compiled:
        """Compiles it for compute capability 80, 90, 100, ..."""
        function = getattr(importlib.import_module(self.module), self.kernel)
        source = ASTSource(function, dict(self.signature), dict(self.constants), dict(self.attributes))
        target = GPUTarget("cuda", capability, 32)
        return measured(triton.compile(source, target=target, options=dict(self.options)))


class _Driver:
    """Stands in for a device: what a launch asks before it compiles."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return int(self._target.arch)  # Triton keeps what it knows by device: not under a real one's number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class _OnTriton(TorchDispatchMode):
    """Gives the operators' calls to their Triton launchers, wherever the tensors are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        launcher = _ops.LAUNCHERS.get(name) if namespace == _ops.NAMESPACE else None
        return (launcher or func)(*args, **(kwargs or {}))


@contextmanager
def launches(capability: int = 90) -> Iterator[dict[str, Launch]]:
    """Inside the block operators on CPU tensors run their Triton launchers, and every launch is left out.

    Yields the launches that were left out, each specialisation once. Results are what was in the memory.
    """
    found: dict[str, Launch] = {}

    def record(*, fn: Any, compile: Mapping[str, Any], **_: Any) -> bool:
        options = {name: compile[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
        attributes = {at: values for config in compile["configs"] for at, values in config.items()}
        launch = Launch(
            fn.module,
            fn.name.rpartition(".")[2],
            compile["signature"],
            compile["constants"],
            attributes,
            options,
        )
        found[f"{launch.kernel} {compile['key']}"] = launch
        return True

    hook, active = triton.knobs.runtime.jit_cache_hook, driver._active
    driver.set_active(_Driver(capability))
    triton.knobs.runtime.jit_cache_hook = record
    try:
        with _OnTriton():
            yield found
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
        driver._active = active

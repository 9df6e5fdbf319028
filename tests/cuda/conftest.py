"""The CUDA C++ kernels as a C++ compiler makes them, block by block and thread by thread, under their launchers."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unlearn_kernels import _loader

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a shared library."""
    if not _loader.have_C:
        pytest.skip("the extension is not built")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("emulated") / "emulated.so"
    flags = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-Wno-unknown-pragmas")
    source = Path(__file__).parent / "emulated.cpp"
    subprocess.run([compiler, *flags, f"-I{ROOT / 'csrc'}", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def on_the_host(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers take CPU tensors."""
    from unlearn_kernels.cuda_kernels import native

    def launch(kernel: str, arguments: Sequence[int], device: torch.device) -> None:
        assert device.type == "cpu"
        getattr(emulated, kernel)((ctypes.c_int64 * len(arguments))(*arguments))

    monkeypatch.setattr(native, "launch", launch)


@pytest.fixture
def same_backwards(emulated: ctypes.CDLL) -> Callable[[Callable[[], Sequence[Tensor]]], None]:
    """Asserts that the order in which threads and blocks run shows in no bit of what a function gives."""

    def check(run: Callable[[], Sequence[Tensor]]) -> None:
        first = run()
        emulated.run_backwards(1)
        try:
            second = run()
        finally:
            emulated.run_backwards(0)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    return check

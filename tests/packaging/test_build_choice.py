"""When setup.py builds the CUDA kernels, and what it says when it does not."""

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]
Choose = Callable[..., tuple[Path | None, str]]


def toolkit(folder: Path, release: str, *, headers: bool = True) -> Path:
    """A folder that looks like a CUDA toolkit, or, without headers, like a shim on PATH."""
    (folder / "bin").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    nvcc.chmod(0o755)
    if headers:
        (folder / "include").mkdir()
        (folder / "include" / "cuda_runtime.h").touch()
    return folder


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """The CUDA decision of setup.py: the toolkit that it builds with, and its sentence."""

    def run(wish: str, torch_cuda: str | None, home: Path | None = None) -> tuple[Path | None, str]:
        monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
        monkeypatch.setenv("UNLEARN_KERNELS_BUILD_CUDA", wish)
        monkeypatch.setenv("CUDA_HOME", str(home or ""))
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.chdir(ROOT)
        names = runpy.run_path(str(ROOT / "setup.py"))
        return names["CUDA_HOME"], names["CUDA_SENTENCE"]

    return run


def test_cpu_torch_skips_with_a_sentence(choose: Choose, tmp_path: Path) -> None:
    assert choose("auto", None, toolkit(tmp_path, "13.0")) == (None, "CUDA skipped: torch is a CPU build")


def test_another_major_skips_and_names_both(choose: Choose, tmp_path: Path) -> None:
    home, sentence = choose("auto", "13.0", toolkit(tmp_path, "12.4"))
    assert home is None
    assert sentence == "CUDA skipped: nvcc is 12.4 but torch was built with CUDA 13.0"


def test_a_shim_is_no_toolkit(choose: Choose, tmp_path: Path) -> None:
    home, sentence = choose("auto", "13.0", toolkit(tmp_path, "13.0", headers=False))
    assert home is None
    assert sentence == "CUDA skipped: no CUDA toolkit found for torch's CUDA 13.0 (set CUDA_HOME)"


def test_the_same_major_builds_what_there_is(choose: Choose, tmp_path: Path) -> None:
    home, sentence = choose("auto", "13.0", toolkit(tmp_path, "13.2"))
    if any((ROOT / "csrc" / "cuda").glob("*.cu")):
        assert (home, sentence) == (tmp_path, f"CUDA 13.2 from {tmp_path}")
    else:
        assert (home, sentence) == (None, "CUDA skipped: csrc/cuda holds no kernels")


def test_zero_is_never(choose: Choose, tmp_path: Path) -> None:
    assert choose("0", "13.0", toolkit(tmp_path, "13.0"))[0] is None


def test_one_fails_with_both_versions(choose: Choose, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"with CUDA 13\.0; nvcc 12\.4 in "):
        choose("1", "13.0", toolkit(tmp_path, "12.4"))
    with pytest.raises(SystemExit, match="torch is a CPU build"):
        choose("1", None)


def test_an_unknown_wish_is_refused(choose: Choose) -> None:
    with pytest.raises(SystemExit, match="must be auto, 0 or 1, got 'yes'"):
        choose("yes", None)

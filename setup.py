"""The compiled extensions; everything else about the distribution is in pyproject.toml.

`_C` and `_C_cuda` keep to LibTorch's stable ABI and Python's limited API. pybind11 cannot, so neither can
`_host`, and a wheel that holds it fits one version of Python: that is why no abi3 tag is set here.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
INCLUDE = str(ROOT / "csrc")  # absolute, because ninja runs in its own folder
# No slower than -O3 in the kernels that were timed, and compiled in 60 % of its time. At -O2 GCC, unlike clang,
# leaves loops of unknown length scalar unless it is told to weigh them.
OPTIMISE = ["-O2", "-ftree-vectorize", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden"]
if cpp_extension.check_compiler_is_gcc(cpp_extension.get_cxx_compiler()):
    OPTIMISE.append("-fvect-cost-model=dynamic")
OPTIMISE += shlex.split(os.environ.get("CXXFLAGS", ""))  # last, so that they win
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY", "-DPy_LIMITED_API=0x030A0000"]
TILE = sorted(glob("csrc/tile/**/*.cpp", recursive=True))
CPU = ["csrc/schema.cpp", *TILE, *sorted(glob("csrc/cpu/**/*.cpp", recursive=True))]
HOST = sorted(glob("csrc/host/*.cpp"))
CUDA, CUDA_GLUE = sorted(glob("csrc/cuda/*.cu")), sorted(glob("csrc/cuda/*.cpp"))


def first_output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def toolkit() -> tuple[Path, str] | None:
    """The CUDA toolkit's folder and release. An nvcc without headers beside it is a shim, not a toolkit."""
    nvcc = Path(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc").resolve()
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    homes = [Path(home) for home in named if home] or [nvcc.parents[1], Path("/usr/local/cuda")]
    for home in homes:
        if (home / "bin/nvcc").is_file() and (home / "include/cuda_runtime.h").is_file():
            release = re.search(r"release ([\d.]+)", first_output(str(home / "bin/nvcc"), "--version"))
            return home, release[1]
    return None


def cuda_problem(found: tuple[Path, str] | None) -> str | None:
    """Why the CUDA kernels cannot be built, or None."""
    if torch.version.cuda is None:
        return "torch is a CPU build"
    if found is None:
        return f"no CUDA toolkit found for torch's CUDA {torch.version.cuda} (set CUDA_HOME)"
    if found[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {found[1]} but torch was built with CUDA {torch.version.cuda}"
    return None if CUDA else "csrc/cuda holds no kernels"


def decide_cuda() -> tuple[Path | None, str]:
    """The toolkit to build with (None: do not build) and the sentence for the summary."""
    wish = os.environ.get("UNLEARN_KERNELS_BUILD_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"UNLEARN_KERNELS_BUILD_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return None, "CUDA skipped: UNLEARN_KERNELS_BUILD_CUDA=0"
    found = toolkit()
    problem = cuda_problem(found)
    if problem and wish == "1":
        nvcc = f"{found[1]} in {found[0]}" if found else "not found"
        versions = f"torch {torch.__version__} with CUDA {torch.version.cuda}; nvcc {nvcc}"
        sys.exit(f"UNLEARN_KERNELS_BUILD_CUDA=1, but {problem}. Versions: {versions}.")
    return (None, f"CUDA skipped: {problem}") if problem else (found[0], f"CUDA {found[1]} from {found[0]}")


CUDA_HOME, CUDA_SENTENCE = decide_cuda()
ISA = ["baseline", "avx2", "avx512"] if platform.machine().lower() in ("x86_64", "amd64") else ["baseline"]


class Build(cpp_extension.BuildExtension):
    """Compiles the tile engine once for `_C` and `_host`, and leaves a record of the build in the package."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip hands every editable build a new folder; a lasting one lets ninja compile only what changed.
        self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "unlearn_kernels._host":  # comes after _C, which has compiled them
            ext.extra_objects = self.compiler.object_filenames(TILE, output_dir=self.build_temp)
        super().build_extension(ext)

    def run(self) -> None:
        print(f"building: CPU ({', '.join(ISA)}); {CUDA_SENTENCE}", flush=True)
        super().run()
        package = Path(self.get_ext_fullpath("unlearn_kernels._C")).parent
        record = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": first_output(self.compiler.compiler_cxx[0], "--version").partition("\n")[0],
            "flags": [*OPTIMISE, *STABLE],
            "isa": ISA,
            "cuda": CUDA_SENTENCE,
        }
        (package / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n")
        if not self.inplace:  # so that an installed package can show on which GPUs its kernels have run
            (package / "_results").mkdir(exist_ok=True)
            for path in glob("benchmarks/results/*.json"):
                shutil.copy(path, package / "_results")


def extensions() -> list[Extension]:
    stable = {"include_dirs": [INCLUDE], "py_limited_api": True}
    cxx = [*OPTIMISE, *STABLE]
    found = [cpp_extension.CppExtension("unlearn_kernels._C", CPU, extra_compile_args={"cxx": cxx}, **stable)]
    dirs, threads = [INCLUDE, pybind11.get_include()], ["-pthread"]
    host = {"language": "c++", "extra_compile_args": OPTIMISE + threads, "extra_link_args": threads}
    found.append(Extension("unlearn_kernels._host", HOST, dirs, **host))
    if CUDA_HOME:
        cpp_extension.CUDA_HOME = str(CUDA_HOME)
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        args = {"cxx": cxx, "nvcc": ["-O3", "-std=c++17"]}
        cuda = cpp_extension.CUDAExtension(
            "unlearn_kernels._C_cuda", [*CUDA_GLUE, *CUDA], extra_compile_args=args, **stable
        )
        found.append(cuda)
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": Build})

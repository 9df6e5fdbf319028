"""The sdist and the wheel: what is in them, and that the wheel works where nothing else is installed."""

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SITE = Path(torch.__file__).parents[1]

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith("UNLEARN_KERNELS_")} | environment
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist alone, as an installer would build it, but in a third of the time."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    flags = ("--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder)
    source = next(folder.glob("unlearn_kernels-*/"))
    run(sys.executable, "-m", "pip", "wheel", *flags, source, cwd=folder, CXXFLAGS="-O0")
    return next(folder.glob("*.whl"))


def test_sdist_holds_all_that_a_build_reads(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert len(sources) > 10
    assert names >= sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md"}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_wheel_holds_both_packages_and_no_library_of_torch(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= {f"unlearn_kernels/{name}" for name in ("_C.abi3.so", "_build_info.json", "py.typed")}
    assert names >= {f"unlearn_adapters/{name}" for name in ("__init__.py", "py.typed")}
    assert not [n for n in names if "libtorch" in n or "libcudart" in n or n.startswith(("tests", "csrc"))]
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name  # not abi3, because of _host


def test_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    """Only the wheel is installed; torch is seen through a path file, so that it is not fetched again."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", where, cwd=tmp_path).strip())
    zipfile.ZipFile(wheel).extractall(site)
    # A bare path runs none of that folder's .pth files, so an editable install there stays unseen.
    (site / "torch_of_the_tests.pth").write_text(f"{SITE}\n")
    report = json.loads(run(python, "-m", "unlearn_kernels", "--json", cwd=tmp_path))
    assert report["extensions"]["_C"] == "loaded"
    assert report["extensions"]["_host"] == "loaded"
    assert "-O0" in report["build"]["flags"]
    origin = run(
        python, "-c", "import unlearn_kernels, unlearn_adapters as a; print(a.__file__)", cwd=tmp_path
    )
    assert origin.startswith(str(site))

"""What `import unlearn_kernels` does, seen in processes of their own."""

import json
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import unlearn_adapters
import unlearn_kernels
from unlearn_kernels import _loader

PACKAGE = Path(unlearn_kernels.__file__).parent
SITE = Path(torch.__file__).parents[1]
HEAVY = {
    "transformers",
    "diffusers",
    "triton",
    "scipy",
    "matplotlib",
    "rich",
    "opacus",
    "torchjd",
    "tokenizers",
}


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter."""
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)


def test_import_adds_no_framework_and_prints_nothing() -> None:
    run = python(
        "import json, sys, torch; before = set(sys.modules)\n"
        "import unlearn_kernels\n"
        "added = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(json.dumps(sorted(added)))"
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    added = json.loads(run.stdout)
    assert "unlearn_kernels" in added
    assert HEAVY.isdisjoint(added)
    assert "unlearn_adapters" not in added


def test_kernels_never_import_adapters() -> None:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py")]
    assert sources
    assert not any("import unlearn_adapters" in s or "from unlearn_adapters" in s for s in sources)


def test_one_version() -> None:
    assert unlearn_kernels.__version__ == unlearn_adapters.__version__ == version("unlearn-kernels")


@pytest.fixture
def source_tree(tmp_path: Path) -> str:
    """Code that makes an interpreter see the package's Python files, without any extension, and torch."""
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / "unlearn_kernels" / path.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    return f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(SITE)!r}]\n"


# With -S no .pth file is read: an editable install would lend its extensions to the copy.
def test_source_tree_without_extension_says_how_to_build(source_tree: str) -> None:
    run = python(f"{source_tree}import runpy; runpy.run_module('unlearn_kernels', run_name='__main__')", "-S")
    assert _loader.BUILD_COMMAND in run.stdout, run.stderr
    assert run.returncode == 1


def test_source_tree_without_extension_computes_by_reference(source_tree: str) -> None:
    call = "uk.per_sample.linear.sqnorms(torch.ones(2, 3, 4), torch.ones(2, 3, 5), backend={!r})"
    code = f"{source_tree}import torch, unlearn_kernels as uk\nprint({call.format('reference')}.tolist())\n"
    run = python(code + call.format("cpp"), "-S")
    assert run.stdout.strip() == "[180.0, 180.0]"  # 4 * 5 entries of 3 * 1 * 1
    assert "BackendError" in run.stderr
    assert _loader.BUILD_COMMAND in run.stderr


def test_extensions_are_tagged_by_what_they_need() -> None:
    """_C keeps to the limited API; _host, by pybind11, fits this Python alone."""
    assert (PACKAGE / "_C.abi3.so").is_file()
    assert (PACKAGE / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}").is_file()

"""Loads the compiled extensions. A missing one is remembered, not reported: the package imports without it."""

from importlib import import_module
from pathlib import Path
from typing import Final

BUILD_COMMAND: Final = "pip install --no-build-isolation -e ."

load_errors: Final[dict[str, str]] = {}


def _load(name: str) -> bool:
    try:
        import_module(f"unlearn_kernels.{name}")
    except ImportError as error:
        built = any(Path(__file__).parent.glob(f"{name}.*"))
        load_errors[name] = (
            str(error) if built else f"not built here; in the source folder run: {BUILD_COMMAND}"
        )
        return False
    return True


have_C: Final = _load("_C")
have_C_cuda: Final = have_C and _load("_C_cuda")

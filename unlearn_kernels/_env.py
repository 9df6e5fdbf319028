"""Environment variables, read once at import: call paths stay traceable by `torch.compile`."""

import os
from typing import Final, NamedTuple


class Variable(NamedTuple):
    default: str
    options: str
    description: str


VARIABLES: Final[dict[str, Variable]] = {
    "UNLEARN_KERNELS_BACKEND": Variable(
        "",
        "reference, cpp, triton, cuda",
        "Backend of every call that names none. Empty: the device's default.",
    ),
    "UNLEARN_KERNELS_ISA": Variable(
        "auto",
        "auto, baseline, avx2, avx512",
        "Instruction set of the C++ kernels. Read by the extension at first use.",
    ),
    "UNLEARN_KERNELS_BUILD_CUDA": Variable(
        "auto",
        "auto, 0, 1",
        "At build time: compile the CUDA C++ kernels when possible, never, or fail if impossible.",
    ),
}

_VALUES: Final[dict[str, str]] = {name: os.environ.get(name, v.default) for name, v in VARIABLES.items()}


def get(name: str) -> str:
    """The value that `name` had when the package was imported, or its default."""
    return _VALUES[name]

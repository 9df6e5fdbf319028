"""Kernels in Triton's interpreter, or on a GPU where there is one.

Triton chooses the interpreter when it is imported, so these tests need their own process: `test_interpreter.py` starts
it, and a plain run of pytest on a machine without a GPU passes them by.
"""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if item.path.is_relative_to(os.path.dirname(__file__)):
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """Tensors are made where the kernels run."""
    with torch.device("cpu" if INTERPRETED else "cuda"):
        yield

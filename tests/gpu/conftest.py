"""Tests that need a GPU. `GPU_TESTS_ON=cpu` runs those that make sense there on the CPU's kernels:
it shows, where no GPU is, that the tests themselves are in order."""

import os

import pytest
import torch

from unlearn_kernels._backends import REGISTRY

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
MISSING = None if DEVICE == "cpu" or torch.cuda.is_available() else "torch finds no CUDA device"


def families(item: pytest.Item) -> set[str]:
    """The families whose operators a test asks for: all where it names none."""
    asked = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "operator" in asked:
        return {asked["operator"].family}
    name = asked.get("name", "").removeprefix("cuda_")
    raw = {o.family for o in REGISTRY.values() if str(o.impls["cpp"].call).split(".")[-2:-1] == [name]}
    return raw or {o.family for o in REGISTRY.values()}


@pytest.hookimpl(tryfirst=True)  # before -k looks for the names
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(os.path.dirname(__file__))]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        item.extra_keyword_matches.update(families(item))
        if MISSING:
            item.add_marker(pytest.mark.skip(reason=MISSING))
        elif DEVICE == "cpu" and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="asks what only a CUDA device can do"))


@pytest.fixture
def device() -> str:
    return DEVICE

"""Tests that need a GPU. `GPU_TESTS_ON=cpu` runs those that make sense there on the CPU's kernels:
it shows, where no GPU is, that the tests themselves are in order."""

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
MISSING = None if DEVICE == "cpu" or torch.cuda.is_available() else "torch finds no CUDA device"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if item.path.is_relative_to(os.path.dirname(__file__))]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if MISSING:
            item.add_marker(pytest.mark.skip(reason=MISSING))
        elif DEVICE == "cpu" and item.get_closest_marker("cuda_only"):
            item.add_marker(pytest.mark.skip(reason="asks what only a CUDA device can do"))


@pytest.fixture
def device() -> str:
    return DEVICE

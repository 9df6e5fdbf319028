from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import memory
from benchmarks.gradient_sets import Sets

MB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")


def filled(size: int) -> torch.Tensor:
    return torch.ones(size // 4)


@linux
def test_a_known_temporary_is_measured() -> None:
    float(filled(MB).sum())
    measured = memory.measure(lambda: float(filled(64 * MB).sum()), ())
    assert measured.peak_bytes == pytest.approx(64 * MB, abs=2 * MB)
    assert measured.output_bytes == 0


@linux
def test_outputs_are_not_extra() -> None:
    measured = memory.measure(lambda: filled(64 * MB), ())
    assert measured.output_bytes == 64 * MB
    assert measured.peak_bytes < 2 * MB


@linux
def test_memory_that_was_freed_before_counts_again() -> None:
    for _ in range(2):
        measured = memory.measure(lambda: float(filled(32 * MB).sum()), ())
        assert measured.peak_bytes == pytest.approx(32 * MB, abs=2 * MB)


@linux
def test_work_in_place_needs_nothing() -> None:
    x = filled(32 * MB)
    measured = memory.measure(lambda: x.mul_(2), (x,))
    assert measured.output_bytes == 0
    assert measured.peak_bytes < 2 * MB


def test_storages_are_found_once_in_nested_containers() -> None:
    x = torch.ones(4, 4)
    sets = Sets([[x[0], x[1]], [torch.ones(2)]])
    assert sorted(memory.storages({"a": sets, "b": (x, 3)}).values()) == [8, 64]

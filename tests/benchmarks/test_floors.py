from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import floors
from benchmarks.floors import Floor
from benchmarks.registry import Case


def test_the_floor_is_the_slower_of_arithmetic_and_traffic(
    make_case: Callable[..., Case], floor: Floor
) -> None:
    floor.rates = {"fma": 100.0, "half": 0.0, "axpy": 10.0, "read": 20.0}
    assert floor.seconds(make_case(flops=1000, bytes=20)) == 10.0
    assert floor.seconds(make_case(flops=10, bytes=200)) == 10.0
    assert floor.seconds(make_case(flops=10, bytes=200, bandwidth="axpy")) == 20.0


def test_the_best_rates_of_a_case_are_kept(floor: Floor) -> None:
    floor.sample()
    first = dict(floor.rates)
    assert all(first[name] > 0 for name in ("fma", "axpy", "read"))
    floor.sample()
    assert all(floor.rates[name] >= first[name] for name in first)
    floor.reset()
    assert set(floor.rates.values()) == {0.0}


def test_without_the_extension_the_best_product_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_fma_loop", lambda: None)
    monkeypatch.setitem(floors._GEMM_SIZE, "cpu", 64)
    floor = Floor("cpu", 1)
    floor.sample()
    record = floor.record()
    assert record["fma_source"] == "best dense GEMM"
    assert record["fma_gflops"] > 0

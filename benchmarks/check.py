"""For the test suite: does every operator have a benchmark?"""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.registry import cases_of


def operators_without_case(ops: Iterable[str]) -> list[str]:
    """Those of the operators (names as in `torch.ops.unlearn_kernels`) that no registered case measures."""
    return [op for op in ops if not cases_of(op)]

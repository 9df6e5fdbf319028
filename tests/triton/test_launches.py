"""What the launchers would launch. That it compiles is shown by the dry run in `tests/benchmarks/test_gpu.py`."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import launches
from unlearn_kernels.per_sample import linear
from unlearn_kernels.triton_kernels import aot, dry_run

CAPABILITY = 90


@pytest.fixture(scope="module")
def found() -> dict[str, dry_run.Launch]:
    return launches.of_samples(CAPABILITY) | launches.of_cases([], CAPABILITY)


def test_every_kernel_is_launched(found: dict[str, dry_run.Launch]) -> None:
    assert {launch.kernel for launch in found.values()} == {c.kernel.__name__ for c in aot.cases()}


def test_nothing_is_launched_and_triton_is_left_as_it_was() -> None:
    a = torch.ones(2, 5, 7)
    with dry_run.launches() as made:
        linear.sqnorms(a, a)
    assert made
    before = len(made)
    assert torch.equal(linear.sqnorms(a, a), torch.full((2,), 25.0 * 49))
    assert len(made) == before


def test_a_kernel_that_does_not_fit_is_told() -> None:
    limit = aot.SHARED_LIMITS[CAPABILITY]
    assert launches.problem(aot.Compiled(32, 0, limit, 0, 0, 0), CAPABILITY) is None
    assert "shared memory" in launches.problem(aot.Compiled(32, 0, limit + 1, 0, 0, 0), CAPABILITY)

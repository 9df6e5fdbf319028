"""Every Triton kernel compiles for each GPU generation, within its resources. No GPU is needed."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton

from benchmarks import compiled as evidence
from unlearn_kernels.triton_kernels import aot

CASES = {case.name: case for case in aot.cases()}
CAPABILITIES = evidence.CAPABILITIES
BEFORE = evidence.recorded()
Results = dict[tuple[str, int], Future[aot.Compiled]]


@pytest.fixture(scope="module")
def compiled() -> Iterator[Results]:
    """All compilations, begun at once. They run in processes, because LLVM ends the one in which it fails."""
    workers = min(len(os.sched_getaffinity(0)), 8)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield {(name, cc): pool.submit(aot.compile_named, name, cc) for name in CASES for cc in CAPABILITIES}
        pool.shutdown(cancel_futures=True)


def test_names_are_unique() -> None:
    assert len(CASES) == len(list(aot.cases()))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_compiles(name: str, capability: int, compiled: Results) -> None:
    case, result = CASES[name], compiled[name, capability].result()
    assert result.registers <= 255
    assert result.shared_bytes <= aot.SHARED_LIMITS[capability]
    assert case.spills or result.spilled_bytes <= aot.PARKED_BYTES
    assert not case.tensor_cores or result.tensor_cores > 0
    if BEFORE["triton"] == triton.__version__ and name in BEFORE["kernels"]:
        before = aot.Compiled(**BEFORE["kernels"][name][f"sm_{capability}"])
        assert not list(evidence.losses(name, f"sm_{capability}", before, result))


def test_the_evidence_is_of_these_kernels() -> None:
    assert evidence.missing(BEFORE["kernels"]) is None


def test_losses_are_seen() -> None:
    before, spilling, scalar = (
        aot.Compiled(64, spilled, 0, 0, wgmma, 0) for spilled, wgmma in ((0, 8), (64, 8), (0, 0))
    )
    assert not list(evidence.losses("k", "sm_90", before, before))
    assert [*evidence.losses("k", "sm_90", before, spilling)] == ["k on sm_90 spills 64 B, 0 B before"]
    assert [*evidence.losses("k", "sm_90", before, scalar)] == [
        "k on sm_90 has lost its wgmma.mma_async instructions"
    ]


def test_a_misnamed_argument_is_refused() -> None:
    case = next(iter(CASES.values()))
    with pytest.raises(ValueError, match="has no arguments nonsense"):
        aot.source(replace(case, scalars={"nonsense": "i64"}))

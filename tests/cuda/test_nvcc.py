"""nvcc compiles every CUDA kernel for each GPU generation, within its resources. No GPU is needed."""

import pytest

pytest.importorskip("triton")

from benchmarks import compiled, compiled_cuda
from unlearn_kernels.triton_kernels import aot

HOME = compiled_cuda.toolkit()
BEFORE = compiled.recorded()


@pytest.fixture(scope="module")
def table() -> compiled_cuda.Table:
    if HOME is None:
        pytest.skip("there is no CUDA toolkit")
    return compiled_cuda.compile_all(HOME)


def test_every_kernel_fits(table: compiled_cuda.Table) -> None:
    assert table
    for name, of in table.items():
        assert set(of) == set(compiled_cuda.TARGETS), name
        for target, made in of.items():
            assert made.registers <= 255
            assert made.stack_bytes <= aot.PARKED_BYTES, (
                f"{name} on {target} has {made.stack_bytes} B on its stack"
            )
            assert made.shared_bytes <= compiled_cuda.SHARED_LIMIT


def test_the_evidence_is_of_these_kernels(table: compiled_cuda.Table) -> None:
    assert set(table) == set(BEFORE["cuda"]), "run benchmarks.compiled --write"
    if HOME is not None and compiled_cuda.release(HOME) == BEFORE["nvcc"]:
        for name, of in table.items():
            for target, made in of.items():
                before = compiled_cuda.Compiled(**BEFORE["cuda"][name][target])
                assert made.stack_bytes <= before.stack_bytes
                assert made.shared_bytes <= before.shared_bytes

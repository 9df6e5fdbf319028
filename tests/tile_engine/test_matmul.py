"""The engine's bare product on every ISA variant, through the door that `_host` opens."""

import numpy as np
import pytest
import torch
from torch import Tensor

from unlearn_kernels.testing import assert_as_exact_as, randn

_host = pytest.importorskip("unlearn_kernels._host")

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# Around register tiles (6 or 14 rows, 8 to 32 columns), cache blocks (96, 112, 192, 256) and vectors.
SIZES = [
    (1, 1, 1),
    (6, 16, 256),
    (7, 17, 257),
    (97, 33, 65),
    (5, 300, 513),
    (250, 3, 31),
    (113, 259, 193),
    (3, 2, 0),
]
VARIANTS = [isa for isa, runs in _host.isa_variants().items() if runs]
ISA = pytest.mark.parametrize("isa", VARIANTS)


def bits(x: Tensor) -> np.ndarray:
    """NumPy's view of the same memory; bfloat16 as its bits."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def matmul(a: Tensor, b: Tensor, isa: str, threads: int = 1) -> Tensor:
    return torch.from_numpy(_host.matmul(bits(a), bits(b), isa=isa, threads=threads))


def operands(size: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    m, n, k = size
    return randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)


def test_baseline_runs_everywhere() -> None:
    assert "baseline" in VARIANTS
    assert _host.can_run("baseline")
    assert not _host.can_run("sse9")
    with pytest.raises(ValueError, match="cannot run 'sse9' here"):
        matmul(*operands((2, 2, 2), torch.float32), "sse9")


@ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_float64(size: tuple[int, int, int], dtype: torch.dtype, isa: str) -> None:
    a, b = operands(size, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    result = matmul(a, b, isa)
    assert result.dtype == wide
    assert_as_exact_as("product", result, a.double() @ b.double().T, a.to(wide) @ b.to(wide).T)


@ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, isa: str) -> None:
    a, b = operands((33, 41, 130), dtype)
    expected = matmul(a, b, isa)
    for x, y in ((a.T.contiguous().T, b.T.contiguous().T), (a.repeat_interleave(3, 1)[:, ::3], b)):
        assert torch.equal(matmul(x, y, isa), expected)
    for x, y in ((a[:1].expand(33, -1), b), (a[:, :1].expand(-1, 130), b[:, :1].expand(-1, 130))):
        assert torch.equal(matmul(x, y, isa), matmul(x.contiguous(), y.contiguous(), isa))


@ISA
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_at_every_thread_count(dtype: torch.dtype, isa: str) -> None:
    a, b = operands((500, 530, 90), dtype)
    one = matmul(a, b, isa)
    assert all(torch.equal(one, matmul(a, b, isa, threads)) for threads in (2, 3, 4))


@ISA
def test_nan_and_infinity_reach_only_their_row_and_column(isa: str) -> None:
    a, b = operands((40, 50, 60), torch.float32)
    clean = matmul(a, b, isa)
    a[7, 3], b[11, 59] = torch.nan, torch.inf
    result = matmul(a, b, isa)
    assert result[7].isnan().all()
    assert not result[:, 11].isfinite().any()
    rest = torch.ones(40, 50, dtype=torch.bool)
    rest[7], rest[:, 11] = False, False
    assert torch.equal(result[rest], clean[rest])


def test_measured_peak_is_a_rate() -> None:
    assert _host.fma_peak(seconds=0.01) > 1e8

"""Kernels of the projections other than signs on the CPU, in the interpreter."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference import sketches as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels import influence_dense as dense
from unlearn_kernels.triton_kernels import influence_sketch as sketch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 0x0123_4567_89AB_CDEF
FAR = 1 << 37  # an offset whose blocks do not fit 32 bits


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of coordinates that are sorted: the interpreter sorts slowly."""
    monkeypatch.setattr(sketch, "_CHUNK", 64)


def check(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], x: Tensor, *others: object) -> None:
    """Against float64, as near as the formula; in float64 as near as rounding allows."""
    y, eager = kernel(x, *others), plain(x, *others)
    assert y.dtype == eager.dtype
    floor = math.sqrt(x.shape[-1] + 64) * torch.finfo(y.dtype).eps if x.dtype == torch.float64 else None
    assert_as_exact_as("y", y, plain(x.double(), *others), eager, floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim", "k"), [(1, 1, 1), (3, 150, 17)])
def test_normal(batch: int, dim: int, k: int, dtype: torch.dtype) -> None:
    check(dense.normal_project, reference.normal_project, randn(batch, dim, dtype=dtype), k, SEED, 24)


@pytest.mark.parametrize("offset", [0, 40, FAR])
def test_normal_entries_are_those_of_every_backend(offset: int) -> None:
    """Rows of the identity bring the entries themselves to light: k is a power of 4, so the scale is exact."""
    k, dim = 16, 75
    g = torch.eye(dim)[-9:]
    y = dense.normal_project(g, k, SEED, offset)
    entries = reference.normal_entries(torch.arange(k), torch.arange(dim)[-9:] + offset, SEED)
    assert torch.equal(y, entries.T / 4)
    assert torch.equal(torch.ops.unlearn_kernels.normal_project(g, k, SEED, offset), y)
    columns = dense.dense_adjoint(torch.eye(k)[3:5], dim, SEED, offset, True)
    assert torch.equal(columns[:, -9:], entries[3:5] / 4)


def test_normal_over_several_tiles_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    check(dense.normal_project, reference.normal_project, randn(65, 30), 66, 3, 0)
    split = dense.Parts(rows=16, cols=16, length=64, shares=3, row_tiles=1, col_tiles=1)
    monkeypatch.setattr(dense.Parts, "of", lambda *_: split)
    monkeypatch.setattr(dense, "RUN", 32)
    check(dense.normal_project, reference.normal_project, randn(2, 150), 5, 3, 8)


@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adjoint(dtype: torch.dtype, normal: bool) -> None:
    y = randn(3, 37, dtype=dtype)
    check(dense.dense_adjoint, reference.dense_adjoint, y, 150, SEED, 256, normal)


@pytest.mark.parametrize("offset", [0, FAR])
def test_adjoint_signs_are_those_of_every_backend(offset: int) -> None:
    y = torch.eye(16)[:3]
    signs = dense.dense_adjoint(y, 300, SEED, offset, False)
    assert torch.equal(signs, reference.dense_adjoint(y, 300, SEED, offset, False))
    assert torch.equal(signs, torch.ops.unlearn_kernels.dense_adjoint(y, 300, SEED, offset, False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim", "k", "terms"), [(1, 1, 1, 1), (9, 40, 13, 2)])
def test_sparse(batch: int, dim: int, k: int, terms: int, dtype: torch.dtype) -> None:
    g = randn(batch, dim, dtype=dtype)
    check(sketch.sparse_project, reference.sparse_project, g, k, terms, SEED, 4, 0)


@pytest.mark.parametrize(("offset", "inner"), [(0, 0), (12, 0), (FAR, 0), (0, 7), (12, 7)])
def test_sparse_targets_are_those_of_every_backend(offset: int, inner: int) -> None:
    """Whole numbers: sums have no rounding, so that equal targets and signs are equal results."""
    g = torch.arange(2.0 * 200).remainder(15).sub(7).view(2, 200)
    y = sketch.sparse_project(g, 64, 1, SEED, offset, inner)
    assert torch.equal(y, reference.sparse_project(g, 64, 1, SEED, offset, inner))
    assert torch.equal(y, torch.ops.unlearn_kernels.sparse_project(g, 64, 1, SEED, offset, inner))


def test_sparse_over_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "_MOST_PARTS", 2)
    check(sketch.sparse_project, reference.sparse_project, randn(2, 200), 9, 2, 3, 0, 0)


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_sparse_keeps_what_is_not_finite_to_its_outputs(bad: float) -> None:
    g = torch.ones(2, 60)
    g[0, 5] = bad
    y, expected = (f(g, 16, 2, SEED, 0, 0) for f in (sketch.sparse_project, reference.sparse_project))
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert y.isfinite().sum() == 30


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "offset"), [(1, 0), (300, 4096)])
def test_hadamard(dim: int, offset: int, dtype: torch.dtype) -> None:
    rows = torch.tensor([5, 4097, 0, 70, 8191, 16383])
    check(sketch.hadamard_project, reference.hadamard_project, randn(2, dim, dtype=dtype), rows, SEED, offset)


def test_hadamard_signs_are_those_of_every_backend() -> None:
    g, rows = torch.eye(200)[-2:], torch.tensor([9000, 5, 1 << 26 | 3, 77])
    for offset in (4096, FAR):
        y = sketch.hadamard_project(g, rows, SEED, offset)
        assert torch.equal(y, reference.hadamard_project(g, rows, SEED, offset))
        assert torch.equal(y, torch.ops.unlearn_kernels.hadamard_project(g, rows, SEED, offset))


def test_hadamard_over_several_blocks() -> None:
    rows = torch.tensor([5, 4097, 0, 70, 8191, 16383])
    check(sketch.hadamard_project, reference.hadamard_project, randn(2, 4126), rows, SEED, 3 * 4096)


def test_hadamard_over_several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "_SCRATCH", 4096)
    rows = torch.tensor([5, 4097, 0])
    check(sketch.hadamard_project, reference.hadamard_project, randn(1, 8192 + 5), rows, 1, 0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "tokens", "d", "p", "k"), [(1, 1, 1, 1, 1), (2, 5, 7, 20, 16), (1, 70, 5, 3, 64)]
)
def test_tensor_sketch(
    batch: int, tokens: int, d: int, p: int, k: int, dtype: torch.dtype, bias: bool
) -> None:
    a, g = randn(batch, tokens, d, dtype=dtype), randn(batch, tokens, p, dtype=dtype, seed=1)
    y, eager = sketch.tensor_sketch(a, g, bias, k, SEED), reference.tensor_sketch(a, g, bias, k, SEED)
    floor = 64 * torch.finfo(y.dtype).eps if dtype == torch.float64 else None
    exact = reference.tensor_sketch(a.double(), g.double(), bias, k, SEED)
    assert_as_exact_as("y", y, exact, eager, floor=floor)


def test_tensor_sketch_is_that_of_every_backend() -> None:
    a, g = (torch.arange(2.0 * 3 * n).remainder(5).sub(2).view(2, 3, n) for n in (9, 6))
    y = sketch.tensor_sketch(a, g, True, 64, SEED)
    assert torch.equal(y, reference.tensor_sketch(a, g, True, 64, SEED))
    assert torch.equal(y, torch.ops.unlearn_kernels.tensor_sketch(a, g, True, 64, SEED))


def test_strides() -> None:
    g = randn(3, 60)
    apart, rows = g.T.contiguous().T, torch.tensor([1, 700])
    assert torch.equal(dense.normal_project(apart, 9, 1, 0), dense.normal_project(g, 9, 1, 0))
    assert torch.equal(dense.dense_adjoint(apart, 40, 1, 0, False), dense.dense_adjoint(g, 40, 1, 0, False))
    assert torch.equal(sketch.sparse_project(apart, 9, 2, 1, 0, 0), sketch.sparse_project(g, 9, 2, 1, 0, 0))
    assert torch.equal(sketch.hadamard_project(apart, rows, 1, 0), sketch.hadamard_project(g, rows, 1, 0))
    a = g.view(1, 3, 60)
    y = sketch.tensor_sketch(a, a, False, 8, 1)
    assert torch.equal(sketch.tensor_sketch(apart[None], a, False, 8, 1), y)


def test_nothing() -> None:
    for g in (torch.zeros(0, 9), torch.zeros(2, 0)):
        assert dense.normal_project(g, 5, 1, 0).tolist() == [[0.0] * 5] * len(g)
        assert dense.dense_adjoint(g, 5, 1, 0, True).tolist() == [[0.0] * 5] * len(g)
        assert sketch.sparse_project(g, 5, 2, 1, 0, 0).tolist() == [[0.0] * 5] * len(g)
        assert sketch.hadamard_project(g, torch.arange(5), 1, 0).tolist() == [[0.0] * 5] * len(g)
    empty = torch.zeros(2, 0, 3)
    assert sketch.tensor_sketch(empty, empty, True, 4, 1).tolist() == [[0.0] * 4] * 2

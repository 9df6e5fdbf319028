"""Projection and search kernels on the CPU, in the interpreter."""

import math

import pytest
import torch

from unlearn_kernels.reference import influence as reference
from unlearn_kernels.testing import assert_as_exact_as, randn, relative_error
from unlearn_kernels.triton_kernels import influence as kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 0x0123_4567_89AB_CDEF


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim", "k"), [(1, 1, 1), (3, 300, 17)])
def test_project(batch: int, dim: int, k: int, dtype: torch.dtype) -> None:
    g = randn(batch, dim, dtype=dtype)
    y = kernels.rademacher_project(g, k, SEED)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eager = reference.rademacher_project(g, k, SEED)
    floor = math.sqrt(dim + 16) * torch.finfo(y.dtype).eps if dtype == torch.float64 else None
    assert_as_exact_as("y", y, reference.rademacher_project(g.double(), k, SEED), eager, floor=floor)


@pytest.mark.parametrize("batch", [2, 17])
def test_signs_are_those_of_every_backend(batch: int) -> None:
    """The first rows of the identity bring the signs themselves to light."""
    k, dim = 16, 160
    g = torch.eye(dim)[-batch:]
    y = kernels.rademacher_project(g, k, SEED)  # k is a power of 4: the scale is exact
    signs = reference.rademacher_signs(torch.arange(k), torch.arange(dim)[-batch:], SEED)
    assert torch.equal(y, signs.T.float() / 4)
    assert torch.equal(torch.ops.unlearn_kernels.rademacher_project(g, k, SEED), y)


def test_project_over_several_tiles() -> None:
    g = randn(65, 30)
    y, exact = kernels.rademacher_project(g, 66, 3), reference.rademacher_project(g.double(), 66, 3)
    assert relative_error(y, exact) < 1e-6


def test_project_over_several_parts() -> None:
    g = randn(2, 8192 + 77)
    y, exact = kernels.rademacher_project(g, 5, 3), reference.rademacher_project(g.double(), 5, 3)
    assert relative_error(y, exact) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_project_of_scattered_blocks(dtype: torch.dtype) -> None:
    g, blocks = randn(2, 300, dtype=dtype), torch.tensor([7, 2, 1 << 31])
    y = kernels.rademacher_project(g, 5, SEED, blocks)
    exact = reference.rademacher_project(g.double(), 5, SEED, blocks)
    assert relative_error(y, exact) <= (1e-14 if dtype == torch.float64 else 1e-6)


def test_project_strides_and_nothing() -> None:
    g = randn(6, 140)
    expected = kernels.rademacher_project(g, 9, 1)
    assert torch.equal(kernels.rademacher_project(g.T.contiguous().T, 9, 1), expected)
    assert torch.equal(kernels.rademacher_project(g[:1].expand(6, 140), 9, 1), expected[:1].expand(6, 9))
    assert kernels.rademacher_project(g[:0], 9, 1).shape == (0, 9)
    assert kernels.rademacher_project(g[:, :0], 9, 1).eq(0).all()


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return numbers.float().to(torch.get_default_device())


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q", "n", "d", "k"), [(1, 1, 1, 1), (5, 70, 50, 9), (18, 33, 3, 33)])
def test_topk_with_ties(q: int, n: int, d: int, k: int, dtype: torch.dtype, largest: bool) -> None:
    queries, rows = whole_numbers(q, d).to(dtype), whole_numbers(n, d, seed=1).to(dtype)
    values, indices = kernels.topk(queries, rows, k, largest)
    expected = reference.topk(queries.double(), rows.double(), k, largest)
    assert torch.equal(values.double(), expected[0])
    assert torch.equal(indices, expected[1])


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_nan_inf_and_zeros(dtype: torch.dtype, largest: bool) -> None:
    """Against NaN above every number, and 0 and -0 equal."""
    scores = [0.0, -0.0, math.nan, math.inf, 2.0, -math.inf, 0.0, -1.5]
    rows = torch.tensor(scores, dtype=dtype)[:, None]
    queries = torch.ones(1, 1, dtype=dtype)
    for k in range(1, 9):
        values, indices = kernels.topk(queries, rows, k, largest)
        expected = reference.topk(queries, rows, k, largest)
        assert torch.equal(indices, expected[1])
        torch.testing.assert_close(values, expected[0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_over_several_ranges(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_ranges", lambda q, n: [(b, min(40, n - b)) for b in range(0, n, 40)])
    monkeypatch.setattr(kernels, "_QUERIES", 3)
    queries, rows = whole_numbers(7, 5).to(dtype), whole_numbers(101, 5, seed=1).to(dtype)
    values, indices = kernels.topk(queries, rows, 50, True)
    expected = reference.topk(queries, rows, 50, True)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])


def test_topk_empty() -> None:
    assert kernels.topk(torch.zeros(0, 3), torch.zeros(4, 3), 2, True)[0].shape == (0, 2)
    assert kernels.topk(torch.zeros(2, 3), torch.zeros(4, 3), 0, True)[1].shape == (2, 0)
    assert kernels.topk(torch.zeros(2, 0), torch.zeros(4, 0), 2, True)[1].tolist() == [[0, 1]] * 2

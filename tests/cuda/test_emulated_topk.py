"""Streaming search in CUDA C++: exact, ties by index."""

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.cuda.lists import BF16, DTYPES, F16, F32, F64
from unlearn_kernels.cuda_kernels import influence
from unlearn_kernels.reference import influence as reference
from unlearn_kernels.testing import assert_as_exact_as, randn

pytestmark = pytest.mark.usefixtures("on_the_host")
LARGEST = pytest.mark.parametrize("largest", [True, False])


def whole_numbers(*shape: int, seed: int = 0) -> Tensor:
    """With many ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def compare(queries: Tensor, rows: Tensor, k: int, largest: bool) -> None:
    """All bits, where products and sums are exact."""
    values, indices = influence.topk(queries, rows, k, largest)
    expected = reference.topk(queries.double(), rows.double(), k, largest)
    assert values.dtype == (F64 if queries.dtype == F64 else F32)
    torch.testing.assert_close(values.double(), expected[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, expected[1])


@LARGEST
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("q", "n", "d", "k"),
    [(1, 1, 1, 1), (5, 70, 50, 9), (70, 133, 3, 133), (8, 1500, 40, 7), (9, 1500, 33, 300)],
)
def test_ties(q: int, n: int, d: int, k: int, dtype: torch.dtype, largest: bool) -> None:
    compare(whole_numbers(q, d).to(dtype), whole_numbers(n, d, seed=1).to(dtype), k, largest)


@LARGEST
@pytest.mark.parametrize("dtype", [F32, F64])
def test_nan_inf_and_zeros(dtype: torch.dtype, largest: bool) -> None:
    scores = [0.0, -0.0, math.nan, math.inf, 2.0, -math.inf, 0.0, -1.5, math.nan, 1e-40, -1e-40]
    rows = torch.tensor(scores, dtype=dtype)[:, None]
    for k in range(1, len(scores) + 1):
        compare(torch.ones(1, 1, dtype=dtype), rows, k, largest)


@LARGEST
@pytest.mark.parametrize("k", [1, 30, 700])
@pytest.mark.parametrize("order", [1, -1])
def test_rows_that_get_better_all_the_time(order: int, k: int, largest: bool) -> None:
    """Every row enters its list, which is shortened again and again."""
    rows = (order * torch.arange(3000.0))[:, None]
    compare(torch.tensor([[1.0], [0.0], [-2.0]]), rows, k, largest)


@LARGEST
def test_scores_that_begin_alike(largest: bool) -> None:
    """Only the last digits of the keys tell them apart."""
    compare(torch.ones(2, 1, dtype=F64), 1 + torch.arange(900, dtype=F64)[:, None] * 2.0**-52, 400, largest)
    compare(torch.ones(2, 1), torch.full((900, 1), 3.0), 400, largest)
    compare(torch.ones(2, 1), torch.full((900, 1), math.nan), 400, largest)


@LARGEST
@pytest.mark.parametrize("dtype", [F32, F64])
def test_several_lists_a_query(dtype: torch.dtype, largest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "_LEAST_ROWS", 1)
    queries, rows = whole_numbers(11, 5).to(dtype), whole_numbers(1001, 5, seed=1).to(dtype)
    for k in (1, 33, 100, 250, 1001):
        compare(queries, rows, k, largest)


def test_several_runs_of_queries() -> None:
    compare(whole_numbers(1030, 2), whole_numbers(40, 2, seed=1), 3, True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers(dtype: torch.dtype) -> None:
    """Sums of more than one run, as exact as a product of matrices."""
    queries, rows = randn(3, 4500, dtype=dtype), randn(60, 4500, dtype=dtype, seed=1)
    values, indices = influence.topk(queries, rows, 60, True)
    scores = queries.double() @ rows.double().T
    eager = (queries.to(values.dtype) @ rows.to(values.dtype).T).gather(1, indices)
    floor = math.sqrt(4500) * torch.finfo(F64).eps if dtype == F64 else None
    assert_as_exact_as("scores", values, scores.gather(1, indices), eager, floor=floor)
    assert bool((indices.sort(1).values == torch.arange(60)).all())
    assert bool((values.diff(dim=1) <= 0).all())


def test_bits_depend_on_no_other_query() -> None:
    queries, rows = randn(70, 300), randn(500, 300, seed=1)
    many = influence.topk(queries, rows, 20, True)
    few = influence.topk(queries[:3], rows, 20, True)
    for a, b in zip(many, few, strict=True):
        assert torch.equal(a[:3], b)


def test_strides_and_mixed_types() -> None:
    queries, rows = whole_numbers(9, 64), whole_numbers(300, 64, seed=1)
    expected = reference.topk(queries, rows, 40, True)
    apart = torch.full((300, 200), math.nan)
    apart[:, 3:67] = rows
    shifted = torch.full((300 * 64 + 1,), math.nan, dtype=BF16)[1:].view(300, 64).copy_(rows)
    for q, r in (
        (queries.T.contiguous().T, rows),
        (queries, rows.T.contiguous().T),
        (queries, apart[:, 3:67]),
        (queries.half(), rows.to(BF16)),
        (queries, shifted),
        (queries.to(F16), rows.repeat_interleave(2, 1)[:, ::2]),
    ):
        for a, b in zip(influence.topk(q, r, 40, True), expected, strict=True):
            assert torch.equal(a, b)
    compare(queries[:1].expand(9, 64), rows, 40, False)


def test_nothing() -> None:
    assert influence.topk(torch.zeros(0, 3), torch.zeros(4, 3), 2, True)[0].shape == (0, 2)
    assert influence.topk(torch.zeros(2, 3), torch.zeros(4, 3), 0, True)[1].shape == (2, 0)
    assert influence.topk(torch.zeros(2, 3), torch.zeros(0, 3), 0, True)[1].shape == (2, 0)
    assert influence.topk(torch.zeros(2, 0), torch.zeros(4, 0), 2, True)[1].tolist() == [[0, 1]] * 2


def test_no_thread_waits_for_another_between_barriers(
    same_backwards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The places of keys in a list depend on the order of threads, the best of them do not."""
    monkeypatch.setattr(influence, "_LEAST_ROWS", 1)

    def run() -> list[Tensor]:
        found: list[Tensor] = []
        for dtype in (F32, F64):
            queries, rows = whole_numbers(9, 30).to(dtype), randn(1500, 30, seed=1).to(dtype)
            for k in (5, 200):
                found += influence.topk(queries, rows, k, True)
        return found

    same_backwards(run)

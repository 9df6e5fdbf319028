"""The streaming top-k search against a full product and a sort."""

import math

import pytest
import torch

from unlearn_kernels._backends import BackendError
from unlearn_kernels.influence import TopK, topk
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def whole_numbers(*shape: int, seed: int = 0, most: int = 3) -> torch.Tensor:
    """Small integers: their products are exact in every order of summation, and often equal."""
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def definition(queries: torch.Tensor, rows: torch.Tensor, k: int, largest: bool) -> TopK:
    """The k best by (score, index), one query at a time in plain Python; NaN above every number."""
    scores = (queries.double() @ rows.double().T).tolist()
    sign = -1 if largest else 1

    def rank(score: float, index: int) -> tuple[float, float, int]:
        return (sign, 0, index) if math.isnan(score) else (0, sign * score, index)

    order = [sorted(range(len(s)), key=lambda n, s=s: rank(s[n], n))[:k] for s in scores]
    values = [[s[n] for n in best] for s, best in zip(scores, order, strict=True)]
    shape = (len(scores), k)
    return TopK(torch.tensor(values).reshape(shape), torch.tensor(order, dtype=torch.int64).reshape(shape))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("q", "n", "d", "k"), [(1, 1, 1, 1), (3, 7, 5, 7), (6, 16, 256, 1), (13, 401, 260, 20), (97, 200, 3, 50)]
)
def test_against_the_definition(q: int, n: int, d: int, k: int, backend: str, largest: bool) -> None:
    """With many equal scores: the order among them is the order of the rows."""
    queries, rows = whole_numbers(q, d), whole_numbers(n, d, seed=1)
    got = topk(queries, rows, k, largest=largest, backend=backend)
    expected = definition(queries, rows, k, largest)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.indices, expected.indices)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize(
    ("q", "n", "d", "k"), [(5, 300, 100, 9), (101, 1003, 300, 17), (200, 150, 1030, 150)]
)
def test_against_float64(q: int, n: int, d: int, k: int, largest: bool, dtype: torch.dtype) -> None:
    queries, rows = randn(q, d, dtype=dtype), randn(n, d, dtype=dtype, seed=1)
    got = topk(queries, rows, k, largest=largest)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (got.values.dtype, got.indices.dtype) == (wide, torch.int64)
    scores = queries.double() @ rows.double().T
    eager = (queries.to(wide) @ rows.to(wide).T).gather(1, got.indices)
    floor = math.sqrt(d) * torch.finfo(wide).eps
    assert_as_exact_as("values", got.values, scores.gather(1, got.indices), eager, floor=floor)
    # No score that was left out is better than one taken by more than rounding.
    exact = scores.topk(k, largest=largest).values
    assert (got.values.double() - exact).abs().max() <= floor * scores.abs().max()
    assert all(len(set(row.tolist())) == k for row in got.indices)


def test_mixed_dtypes() -> None:
    queries, rows = whole_numbers(5, 40), whole_numbers(90, 40, seed=1)
    expected = topk(queries, rows, 7)
    for got in (topk(queries, rows.bfloat16(), 7), topk(queries.half(), rows, 7)):
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.indices, expected.indices)


def test_long_reduction_is_blocked() -> None:
    queries, rows = randn(2, 1 << 18) + 1, randn(20, 1 << 18, seed=1) + 1
    got, exact = topk(queries, rows, 20), queries.double() @ rows.double().T
    assert_as_exact_as("values", got.values, exact.gather(1, got.indices), exact, floor=1e-6)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_and_inf(dtype: torch.dtype, largest: bool) -> None:
    rows = whole_numbers(60, 4, seed=1).to(dtype)
    rows[5, 0], rows[40, 1], rows[20, 2], rows[33, 3] = math.nan, math.nan, math.inf, -math.inf
    queries = torch.ones(2, 4, dtype=dtype)
    for k in (1, 3, 8, 57, 60):
        got, expected = topk(queries, rows, k, largest=largest), definition(queries, rows, k, largest)
        assert torch.equal(got.indices, expected.indices)
        assert torch.equal(got.values.nan_to_num(9e9), expected.values.to(dtype).nan_to_num(9e9))
        theirs = (queries @ rows.T).topk(k, largest=largest).values
        assert torch.equal(got.values.nan_to_num(9e9), theirs.nan_to_num(9e9))


def test_all_nan_and_all_equal() -> None:
    for value in (math.nan, 0.0, math.inf):
        for largest in (True, False):
            got = topk(torch.ones(3, 2), torch.full((500, 2), value), 6, largest=largest)
            assert got.indices.tolist() == [[0, 1, 2, 3, 4, 5]] * 3


@pytest.mark.parametrize("largest", [True, False])
def test_thread_count_does_not_matter(largest: bool) -> None:
    queries, rows = randn(230, 300), randn(2001, 300, seed=1)
    rows[1000:] = rows[:1001].flip(0)  # every score twice
    one, two, four = at_threads((1, 2, 4), lambda: topk(queries, rows, 40, largest=largest))
    for other in (two, four):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.indices, other.indices)


def test_shards_merge_to_the_whole() -> None:
    queries, rows = randn(7, 64), randn(999, 64, seed=1)
    whole = topk(queries, rows, 30)
    parts = [topk(queries, rows[b : b + 333], 30) for b in (0, 333, 666)]
    values = torch.cat([p.values for p in parts], 1)
    indices = torch.cat([p.indices + 333 * n for n, p in enumerate(parts)], 1)
    best = values.topk(30)
    assert torch.equal(best.values, whole.values)
    assert torch.equal(indices.gather(1, best.indices), whole.indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    queries, rows = whole_numbers(19, 70).to(dtype), whole_numbers(310, 70, seed=1).to(dtype)
    expected = topk(queries, rows, 11)
    wide = torch.zeros(310, 140, dtype=dtype)
    wide[:, ::2] = rows
    for q, r in ((queries.T.contiguous().T, rows), (queries, rows.T.contiguous().T), (queries, wide[:, ::2])):
        got = topk(q, r, 11)
        assert torch.equal(got.values, expected.values)
        assert torch.equal(got.indices, expected.indices)
    same = topk(queries, rows[:1].expand(310, 70), 4)
    assert same.indices.tolist() == [[0, 1, 2, 3]] * 19


def test_offsets_beyond_2_to_the_31() -> None:
    """Rows so far apart that their offsets need 64 bits; only the pages that are read come into being."""
    storage = torch.empty((1 << 31) + 4096, dtype=torch.bfloat16)
    rows = storage.as_strided((2, 300), ((1 << 31) + 1000, 1))
    rows.copy_(randn(2, 300, dtype=torch.bfloat16))
    queries = randn(3, 300, dtype=torch.bfloat16, seed=1)
    got, expected = topk(queries, rows, 2), topk(queries, rows.clone(), 2)
    assert torch.equal(got.values, expected.values)
    assert torch.equal(got.indices, expected.indices)


def test_single_query_and_empty() -> None:
    queries, rows = whole_numbers(4, 9), whole_numbers(30, 9, seed=1)
    one, many = topk(queries[2], rows, 5), topk(queries, rows, 5)
    assert torch.equal(one.values, many.values[2])
    assert torch.equal(one.indices, many.indices[2])
    assert topk(torch.zeros(0, 9), rows, 5).values.shape == (0, 5)
    assert topk(queries, rows, 0).indices.shape == (4, 0)
    assert topk(queries, torch.zeros(0, 9), 0).values.shape == (4, 0)
    nothing = topk(torch.zeros(2, 0), torch.zeros(5, 0), 3)
    assert nothing.values.eq(0).all()
    assert nothing.indices.tolist() == [[0, 1, 2]] * 2


def test_vmap() -> None:
    queries, rows = whole_numbers(3, 4, 9), whole_numbers(30, 9, seed=1)
    got = torch.vmap(lambda q: topk(q, rows, 5))(queries)
    expected = topk(queries.reshape(12, 9), rows, 5)
    assert torch.equal(got[0].reshape(12, 5), expected.values)
    assert torch.equal(got[1].reshape(12, 5), expected.indices)


def test_compile() -> None:
    queries, rows = randn(4, 9), randn(30, 9, seed=1)
    compiled = torch.compile(lambda q, r: topk(q, r, 5).values * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(queries, rows), topk(queries, rows, 5).values * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.unlearn_kernels.topk.default
    queries, rows = randn(4, 9, dtype=dtype), randn(30, 9, dtype=dtype, seed=1)
    torch.library.opcheck(op, (queries, rows, 5, True))
    torch.library.opcheck(op, (queries, rows.T.contiguous().T, 0, False))


@pytest.mark.parametrize(
    ("queries", "rows", "k", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 3), 5, "k must be between 0 and 4"),
        (torch.zeros(2, 3), torch.zeros(4, 3), -1, "k must be"),
        (torch.zeros(2, 3), torch.zeros(4, 2), 1, "same width"),
        (torch.zeros(2, 3, 1), torch.zeros(4, 2), 1, "queries must have 2"),
        (torch.zeros(2, 3), torch.zeros(3), 1, "rows must have 2"),
        (torch.zeros(2, 3), torch.zeros(4, 3).double(), 1, "float64 or neither"),
        (torch.zeros(2, 3).long(), torch.zeros(4, 3), 1, "queries must be a floating-point"),
        (torch.zeros(2, 3), torch.zeros(4, 3, requires_grad=True), 1, "rows must not require grad"),
        (torch.zeros(2, 3), torch.zeros(4, 3, device="meta"), 1, "one device"),
    ],
)
def test_errors(queries: torch.Tensor, rows: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topk(queries, rows, k)


def test_backends() -> None:
    with pytest.raises(BackendError, match="topk: backend 'triton'"):
        topk(torch.zeros(2, 3), torch.zeros(4, 3), 1, backend="triton")

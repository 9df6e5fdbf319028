"""Many queries, whose scores are screened: what is found is what a few queries at a time find, which are not."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels._loader import have_C
from unlearn_kernels.testing import at_threads, randn

pytestmark = pytest.mark.skipif(not have_C, reason="needs the compiled extension")

FEW = 4  # queries that are multiplied one by one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("normal", "heavy", "rising", "equal", "blocks", "tiny", "huge", "odd", "sparse")


def numbers(kind: str, n: int, d: int, seed: int) -> Tensor:
    """Rows on which bounds are tight, useless or not numbers."""
    x = randn(n, d, seed=seed)
    if kind == "heavy":
        x = x / randn(n, d, seed=seed + 1).abs().clamp(min=1e-4)
    elif kind == "rising":
        x = x * torch.arange(1, n + 1)[:, None] / n
    elif kind == "equal":
        x = x.sign()
    elif kind == "blocks":
        x = x * 10 ** (torch.arange(d) // 100 % 7 - 3.0)
    elif kind in ("tiny", "huge"):
        x = x * {"tiny": 1e-22, "huge": 1e18}[kind] ** (torch.arange(n) % 3)[:, None]
    elif kind == "odd":
        x[::7, 0], x[1::7, d // 2], x[2::7, -1] = torch.nan, torch.inf, -torch.inf
    elif kind == "sparse":
        x = x * (randn(n, d, seed=seed + 2).abs() > 2)
    return x


def same(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def screens_numbers() -> bool:
    """Without an instruction for integer products all scores are computed, in tiles."""
    isa = torch.ops.unlearn_kernels.isa()
    with open("/proc/cpuinfo") as info:
        return isa == "avx2" or (isa == "avx512" and "avx512_vnni" in info.read())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d", "k"), [(3000, 300, 5), (1500, 1025, 40), (1100, 33, 1), (60, 4500, 60)])
def test_rows_of_numbers(dtype: torch.dtype, kind: str, n: int, d: int, k: int) -> None:
    if not screens_numbers():
        pytest.skip("no screen on this processor")
    queries, rows = numbers(kind, 30, d, 1).to(dtype), numbers(kind, n, d, 5).to(dtype)
    scan = torch.ops.unlearn_kernels.scan_rows
    values, indices = scan(queries, rows, k, 3)
    for begin in (*range(0, 28, FEW), 26):
        part = slice(begin, begin + FEW)
        few_values, few_indices = scan(queries[part], rows, k, 3)
        assert same(values[:, part], few_values)
        assert torch.equal(indices[:, part], few_indices)
    one_end = scan(queries, rows, k, 2)
    assert same(one_end[0][0], values[1])
    assert torch.equal(one_end[1][0], indices[1])


@pytest.mark.parametrize("nibbles", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "d", "k", "block"), [(3000, 301, 5, 6), (1500, 1025, 40, 128), (60, 4500, 60, 256)]
)
def test_rows_of_integers(nibbles: bool, kind: str, n: int, d: int, k: int, block: int) -> None:
    blocks = -(-d // block)
    generator = torch.Generator().manual_seed(d)
    rows = torch.randint(0, 256, (n, (d + 1) // 2 if nibbles else d), generator=generator).byte()
    scales = numbers(kind, n, blocks, 3).contiguous()
    codes = (randn(30, d, seed=2) * 2000).clamp(-8191, 8191).short()
    codes[3], codes[4], codes[5, 1:] = 0, 8191, 0
    scan, ones = torch.ops.unlearn_kernels.scan_codes, torch.ones(30)
    values, indices = scan(codes, ones, rows, scales, block, k, nibbles, 3)
    for begin in range(0, 30, FEW):
        part = slice(begin, begin + FEW)
        few_values, few_indices = scan(codes[part], ones[part], rows, scales, block, k, nibbles, 3)
        assert same(values[:, part], few_values)
        assert torch.equal(indices[:, part], few_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_of_another_type(dtype: torch.dtype) -> None:
    """Numbers that all types have: bit for bit what is found when both are float32."""
    queries, rows = randn(40, 200, seed=1).to(dtype), randn(900, 200, seed=2).to(dtype)
    scan = torch.ops.unlearn_kernels.scan_rows
    exact = scan(queries.double().float(), rows.float(), 20, 3)
    for q, r in ((queries.float(), rows), (queries, rows.float()), (queries, rows)):
        values, indices = scan(q, r, 20, 3)
        assert torch.equal(indices, exact[1])
        assert (values - exact[0]).abs().max() < 1e-5 * exact[0].abs().max()


@pytest.mark.parametrize("kind", ["normal", "rising", "heavy"])
def test_threads(kind: str) -> None:
    """Each has seen other rows, and is left with other ones by the screen."""
    queries, rows = numbers(kind, 20, 600, 1), numbers(kind, 5000, 600, 5)
    one, many = at_threads((1, 4), lambda: torch.ops.unlearn_kernels.scan_rows(queries, rows, 30, 3))
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])


def test_strides_and_views() -> None:
    rows, queries = randn(500, 300, seed=1), randn(20, 300, seed=2)
    scan = torch.ops.unlearn_kernels.scan_rows
    expected = scan(queries[:, 3:250].contiguous(), rows[::2, 3:250].contiguous(), 9, 3)
    found = scan(queries[:, 3:250], rows[::2, 3:250], 9, 3)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    columns = scan(queries.T.contiguous().T, rows, 9, 3)
    assert torch.equal(columns[1], scan(queries, rows, 9, 3)[1])
    assert scan(queries[:, :0], rows[:, :0], 9, 1)[1].tolist() == [[list(range(9))] * 20]


def test_all_that_rounding_takes_away_counts() -> None:
    """Rows that round to one and the same, and what they lose lies along a query: the bound is reached."""
    if not screens_numbers():
        pytest.skip("no screen on this processor")
    n, signs = 3000, randn(30, 500, seed=1).sign()
    unit = 1.0 if torch.ops.unlearn_kernels.isa() == "avx512" else 127 / 2047
    level = torch.rand(n, 1, generator=torch.Generator().manual_seed(3))
    rows = 0.49 * unit * level * signs[torch.arange(n) % 30]
    rows[:, ::256] = 127.0  # of each block of columns
    exact = (signs.double() @ rows.double().T).sort(1, descending=True)
    for sign, end in ((1, 1), (-1, 2)):
        values, indices = torch.ops.unlearn_kernels.scan_rows(signs, sign * rows, 5, end)
        assert torch.equal(indices[0], exact.indices[:, :5])
        assert (sign * values[0] - exact.values[:, :5]).abs().max() < 1e-3


def test_a_last_range_of_few_queries() -> None:
    """Those that are left over get the scores that four at a time do, whatever a thread's rows were."""
    queries, rows = randn(2113, 100, seed=1), randn(1500, 100, seed=2)
    one, many = at_threads((1, 4), lambda: torch.ops.unlearn_kernels.scan_rows(queries, rows, 50, 1))
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[1], many[1])
    for first in (960, 2109):
        few = torch.ops.unlearn_kernels.scan_rows(queries[first : first + 4], rows, 50, 1)
        if screens_numbers():
            assert torch.equal(one[0][:, first : first + 4], few[0])


@pytest.mark.parametrize("d", [4096, 8192])
def test_rows_that_round_to_nothing(d: int) -> None:
    """All they are is what rounding takes away, and sums of them differ by their own rounding."""
    if not screens_numbers():
        pytest.skip("no screen on this processor")
    queries, rows = torch.ones(12, d), torch.zeros(3000, d)
    rows[2900] = (1 + 2**-17 + 2**-22) * 2**-57
    rows[0, 0] = rows[2900].double().sum() * (1 + 3e-6)
    values, indices = torch.ops.unlearn_kernels.scan_rows(queries, rows, 1, 1)
    few = torch.ops.unlearn_kernels.scan_rows(queries[:4], rows, 1, 1)
    assert torch.equal(values[:, :4], few[0])
    assert torch.equal(indices[:, :4], few[1])

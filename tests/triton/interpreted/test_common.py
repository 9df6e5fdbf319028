"""The parts that every Triton kernel is put together from."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from unlearn_kernels.testing import randn, relative_error
from unlearn_kernels.triton_kernels.common import (
    acc_dtype,
    add_product,
    block_size,
    dot_dtype,
    hadamard_sum,
    load_f32,
    lse_update,
    lse_value,
    philox_words,
    program,
    sign_rows,
    span,
    square_sum,
    store_as,
    sum_parts,
)

INF = float("inf")


@triton.jit
def product_kernel(
    a, b, out, sums, m, n, k, a_outer, a_depth, b_outer, b_depth,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    rows, cols = span(program(0) * M, M), span(program(1) * N, N)
    acc = tl.zeros((M, N), dtype=ACC)
    acc = add_product(acc, a, a_outer, a_depth, rows, m, b, b_outer, b_depth, cols, n, k, K, DOT)
    store_as(out + rows[:, None] * n + cols[None, :], acc, (rows < m)[:, None] & (cols < n)[None, :])
    task = program(0) * tl.num_programs(1) + program(1)
    tl.store(sums + 2 * task, square_sum(acc))
    tl.store(sums + 2 * task + 1, hadamard_sum(acc, acc + 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_product_and_its_sums(dtype: torch.dtype, transposed: bool) -> None:
    a, b = randn(19, 21, dtype=dtype), randn(17, 21, dtype=dtype, seed=1)
    if transposed:
        a, b = randn(21, 19, dtype=dtype).T, randn(21, 17, dtype=dtype, seed=1).T
    dot = dot_dtype(a, b)
    out = torch.full((19, 17), torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    sums = torch.full((4, 2), torch.nan, dtype=out.dtype)
    product_kernel[(2, 2)](
        a, b, out, sums, 19, 17, 21, *a.stride(), *b.stride(), 16, 16, 16, dot, acc_dtype(dot)
    )  # fmt: skip
    exact = a.double() @ b.double().T
    floor = 4 * torch.finfo(out.dtype).eps
    assert relative_error(out, exact) <= floor
    wanted = torch.stack([exact.square().sum(), (exact * (exact + 1)).sum()])
    assert relative_error(sums.double().sum(0), wanted) <= floor


def test_half_products_stay_half_except_where_the_interpreter_cannot() -> None:
    half, brain, single = (torch.empty(1, dtype=d) for d in (torch.float16, torch.bfloat16, torch.float32))
    assert dot_dtype(half, half) == tl.float16
    assert dot_dtype(brain, brain) == tl.float32
    assert dot_dtype(half, single) == tl.float32
    assert dot_dtype(single, single.double()) == tl.float64


def philox(counter: tuple[int, ...], seed: int) -> list[int]:
    """Philox4x32-10 from the definition (Salmon et al. 2011), in Python's integers."""
    low, c = 2**32 - 1, list(counter)
    k = [seed & low, seed >> 32 & low]
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [k[0] + 0x9E3779B9 & low, k[1] + 0xBB67AE85 & low]
    return c


@triton.jit
def signs_kernel(out, seed, dim, first_block, K: tl.constexpr):
    rows, block = span(program(0) * K, K), program(1)
    w0, w1, w2, w3 = philox_words(seed, rows, first_block + block)
    at = out + rows[None, :] * dim + span(block * 128, 32)[:, None]
    tl.store(at, sign_rows(w0, tl.float32))
    tl.store(at + 32, sign_rows(w1, tl.float32))
    tl.store(at + 64, sign_rows(w2, tl.float32))
    tl.store(at + 96, sign_rows(w3, tl.float32))


@pytest.mark.parametrize("seed", [0, 1, -5, 2**40 + 3, 2**63 - 1])
def test_signs_are_philox_bits(seed: int) -> None:
    first = 2**31  # coordinates beyond 2^38: block numbers are unsigned
    out = torch.zeros(16, 256)
    signs_kernel[(1, 2)](out, seed, 256, first, K=16)
    wanted = torch.empty(16, 256)
    for row in range(16):
        for block in range(2):
            words = philox((row, first + block, 0, 0), seed & (2**64 - 1))
            bits = [words[i // 32] >> i % 32 & 1 for i in range(128)]
            wanted[row, 128 * block : 128 * (block + 1)] = torch.tensor([2.0 * bit - 1 for bit in bits])
    assert torch.equal(out, wanted)


@triton.jit
def lse_kernel(x, out, n, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = span(0, ROWS)
    peak, mass = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, n, COLS):
        cols = span(start, COLS)
        inside = (cols < n)[None, :]
        logits = load_f32(x + rows[:, None] * n + cols[None, :], inside)
        peak, mass = lse_update(peak, mass, tl.where(inside, logits, float("-inf")))
    tl.store(out + rows, lse_value(peak, mass))


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:divide by zero", "ignore:invalid value")
def test_online_log_sum_exp() -> None:
    x = randn(16, 50) * 40
    x[0], x[1, 3], x[2, 40], x[3, :20], x[4, 45:] = -INF, INF, torch.nan, -INF, -INF
    x[5, 2], x[5, 44] = INF, torch.nan
    out = torch.empty(16)
    lse_kernel[(1,)](x, out, 50, ROWS=16, COLS=16)
    torch.testing.assert_close(out, x.double().logsumexp(1).float(), equal_nan=True)


@pytest.mark.parametrize("count", [0, 1, 7, 1500])
def test_partial_sums_keep_what_fp32_would_drop(count: int) -> None:
    parts = randn(3, count)
    parts[:, :1] = 1e9
    result = sum_parts(parts, torch.float32)
    assert result.dtype == torch.float32
    assert torch.equal(result, _sums(parts))


def _sums(parts: Tensor) -> Tensor:
    return parts.double().sum(1).float()


def test_block_sizes() -> None:
    assert [block_size(n, 128) for n in (0, 1, 16, 17, 100, 128, 999)] == [16, 16, 16, 32, 128, 128, 128]

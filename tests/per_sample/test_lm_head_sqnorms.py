"""Squared norms of a language-model head's per-sample gradients, against autograd in float64."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.per_sample.heads import DTYPES, Case, by_autograd, case, logsumexps, wide
from unlearn_kernels import _host
from unlearn_kernels.per_sample import lm_head
from unlearn_kernels.reference.per_sample.lm_head import lm_head_sqnorms as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads

METHODS = ["direct", "gram", "auto"]
# (T, d, V): one element; primes below a register tile; a long and thin, a short and wide one; several tiles.
SIZES = [(1, 1, 1), (5, 7, 3), (40, 3, 9), (3, 40, 200), (203, 33, 530)]


def norms(x: Case, **options: object) -> Tensor:
    return lm_head.sqnorms(x.h, x.W, x.labels, upstream=x.upstream, bias=x.bias, **options)


def in_eager(x: Case, lse: Tensor | None = None) -> Tensor:
    return reference(x.h, x.labels, x.upstream, lse, x.W, x.bias, -100, 0)


def check(x: Case, method: str = "auto", lse: Tensor | None = None) -> None:
    result = norms(x, method=method, lse=lse)
    x = wide(x)
    assert result.dtype == x.h.dtype
    exact = by_autograd(x).square().sum(1)
    assert_as_exact_as(
        f"norms by {method}", result, exact, in_eager(x, lse), floor=8 * torch.finfo(result.dtype).eps
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_reference_is_autograd(weighted: bool, bias: bool) -> None:
    x = case(3, 6, 5, 11, torch.float64, bias=bias, weighted=weighted)
    expected = by_autograd(x).square().sum(1)
    for lse in (None, logsumexps(x)):
        torch.testing.assert_close(in_eager(x, lse), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size: tuple[int, int, int], dtype: torch.dtype, method: str) -> None:
    check(case(3, *size, dtype), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_options(weighted: bool, bias: bool, method: str) -> None:
    x = case(3, 17, 12, 70, bias=bias, weighted=weighted, ignored=bias)
    check(x, method)
    check(x, method, logsumexps(x))


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_the_vocabulary_and_groups_of_samples(method: str) -> None:
    """2200 rows: more than are in flight, and a vocabulary of several blocks."""
    check(case(11, 200, 4, 1200), method)
    check(case(2, 1300, 3, 1100, bias=False), method)


@pytest.mark.parametrize("method", METHODS)
def test_ignored_rows_are_never_read(method: str) -> None:
    x = case(3, 9, 7, 20)
    x.labels[1] = -100
    expected = norms(x, method=method)
    assert expected[1] == 0
    gone = x.labels == -100
    poisoned = x._replace(
        h=x.h.masked_fill(gone[..., None], torch.nan), upstream=x.upstream.masked_fill(gone, torch.inf)
    )
    assert torch.equal(norms(poisoned, method=method), expected)
    other = x._replace(labels=x.labels.masked_fill(gone, 4))
    check(other, method)
    negative = x._replace(labels=x.labels.masked_fill(gone, -1))
    assert torch.equal(norms(negative, method=method, ignore_index=-1), expected)


def test_one_row_a_sample_and_folded_dimensions() -> None:
    x = case(5, 6, 4, 31, ignored=False)
    folded = x._replace(
        h=x.h.view(5, 2, 3, 4), labels=x.labels.view(5, 2, 3), upstream=x.upstream.view(5, 2, 3)
    )
    assert torch.equal(norms(folded), norms(x))
    single = x._replace(h=x.h[:, :1], labels=x.labels[:, :1], upstream=x.upstream[:, :1])
    flat = Case(x.h[:, 0], x.W, x.labels[:, 0], x.upstream[:, 0], x.bias)
    for method in METHODS:
        check(single, method)
        assert torch.equal(norms(flat, method=method), norms(single, method=method))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    x = case(3, 9, 8, 40, dtype)
    expected = norms(x)
    strided = Case(
        x.h.transpose(0, 2).contiguous().transpose(0, 2),
        x.W.T.contiguous().T,
        x.labels.T.contiguous().T,
        x.upstream.repeat_interleave(2, 1)[:, ::2],
        x.bias.repeat_interleave(3)[::3],
    )
    assert torch.equal(norms(strided), expected)
    check(x._replace(h=x.h[:, :1].expand(-1, 9, -1), labels=x.labels[:1].expand(3, -1)))
    check(x._replace(W=x.W[:, :1].expand(-1, 8)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)], ids=str)
def test_empty(shape: tuple[int, int, int, int], method: str) -> None:
    check(case(*shape), method)


def test_dtypes_of_head_and_tokens_may_differ() -> None:
    x = case(2, 9, 8, 40)
    for method in METHODS:
        check(x._replace(h=x.h.bfloat16(), bias=x.bias.half()), method)
        check(x._replace(W=x.W.half()), method)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_stays_in_its_sample(method: str, value: float) -> None:
    x = case(3, 21, 10, 60, ignored=False)
    clean = norms(x, method=method)
    for name in ("h", "upstream"):
        broken = getattr(x, name).clone()
        broken[1, 20] = value
        result = norms(x._replace(**{name: broken}), method=method)
        assert not result[1].isfinite(), name
        assert torch.equal(result[::2], clean[::2]), name


def test_large_half_values_do_not_overflow() -> None:
    x = case(2, 12, 16, 40, torch.float16)
    x = x._replace(h=x.h * 100, upstream=x.upstream * 1e6)
    result = norms(x)
    assert result.isfinite().all()
    check(x)


def cancelling(vocabulary: int) -> Case:
    """Pairs of the same token with upstream gradients that cancel to 1e-4 of themselves."""
    x = case(2, 20, 70, vocabulary, bias=False, ignored=False)
    h, labels, upstream = (t.clone() for t in (x.h, x.labels, x.upstream))
    h[1, 10:], labels[1, 10:] = h[1, :10], labels[1, :10]
    upstream[1, 10:] = -upstream[1, :10] * (1 + 1e-4)
    return x._replace(h=h, labels=labels, upstream=upstream)


def test_auto_keeps_its_digits_where_the_gram_form_cancels() -> None:
    x = cancelling(400)
    exact = by_autograd(x).square().sum(1)

    def error(method: str) -> float:
        return ((norms(x, method=method) - exact) / exact).abs().max().item()

    assert error("gram") > 1e-2
    assert error("auto") <= 2 * error("direct")
    assert error("direct") <= 2 * ((in_eager(x) - exact) / exact).abs().max().item()
    assert norms(x)[0] == norms(x, method="gram")[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_leave_the_bits(dtype: torch.dtype, method: str) -> None:
    x = case(5, 150, 40, 700, dtype)
    one, *more = at_threads((1, 2, 4), lambda: norms(x, method=method))
    assert all(torch.equal(one, other) for other in more)
    assert torch.equal(one, norms(x, method=method))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_addresses_beyond_32_bits(dtype: torch.dtype) -> None:
    """Strides of more than 2^30 elements over a row of memory that the system never fills."""
    x = case(2, 4, 6, 9, dtype)
    spread = torch.empty(3 << 30, dtype=torch.uint8).view(dtype)
    far = spread.as_strided((2, 4, 6), ((2 << 30) // dtype.itemsize, 8, 1))
    far.copy_(x.h)
    assert torch.equal(norms(x._replace(h=far)), norms(x))


NORMS = """
import torch
from unlearn_kernels.per_sample import lm_head
from unlearn_kernels.testing import randn
assert torch.ops.unlearn_kernels.isa() == {isa!r}
worst = 0.0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    h, W, b = randn(3, 43, 21, dtype=dtype), randn(67, 21, dtype=dtype, seed=1), randn(67, dtype=dtype, seed=2)
    labels = torch.arange(3 * 43).view(3, 43) % 67
    doubled = [x.double() for x in (h, W, b)]
    for method in ("direct", "gram", "auto"):
        norms = lm_head.sqnorms(h, W, labels, bias=b, method=method)
        exact = lm_head.sqnorms(*doubled[:2], labels, bias=doubled[2], backend="reference")
        worst = max(worst, ((norms - exact) / exact).abs().max().item() / torch.finfo(norms.dtype).eps)
print(worst)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_isa(isa: str) -> None:
    if not _host.can_run(isa):
        pytest.skip(f"this build or processor has no {isa}")
    environment = {**os.environ, "UNLEARN_KERNELS_ISA": isa}
    command = [sys.executable, "-c", NORMS.format(isa=isa)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 32

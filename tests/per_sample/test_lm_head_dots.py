"""Inner products of a language-model head's per-sample gradients, with each other and with a tied embedding's."""

import pytest
import torch
from torch import Tensor

from tests.per_sample.heads import DTYPES, Case, by_autograd, case, wide
from unlearn_kernels.per_sample import lm_head
from unlearn_kernels.per_sample.lm_head import Tokens
from unlearn_kernels.reference.per_sample import lm_head as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

METHODS = ["direct", "tokens", "auto"]
# (T1, T2, d, V): one element, primes, several tiles.
SIZES = [(1, 1, 1, 1), (5, 3, 7, 11), (203, 97, 13, 300)]


def pair(B1: int, B2: int, size: tuple[int, int, int, int], dtype: torch.dtype = torch.float32) -> list[Case]:
    T1, T2, d, V = size
    left, right = case(B1, T1, d, V, dtype), case(B2, T2, d, V, dtype, seed=10, ignored=False)
    return [left, right._replace(W=left.W, bias=left.bias)]


def tokens(x: Case) -> Tokens:
    return Tokens(x.h, x.labels, x.upstream)


def dots(left: Case, right: Case, **options: object) -> Tensor:
    return lm_head.dots(tokens(left), tokens(right), left.W, bias=left.bias, **options)


def check(left: Case, right: Case, method: str = "auto") -> None:
    result, total = dots(left, right, method=method), dots(left, right, method=method, summed=True)
    left, right = wide(left), wide(right)
    exact = by_autograd(left) @ by_autograd(right).T
    sides = (left.h, left.labels, left.upstream, None), (right.h, right.labels, right.upstream, None)

    def eager(summed: bool) -> Tensor:
        return reference.lm_head_dots(*sides[0], *sides[1], left.W, left.bias, -100, summed, 0)

    floor = 8 * torch.finfo(result.dtype).eps
    assert result.dtype == total.dtype == left.h.dtype
    assert_as_exact_as(f"dots by {method}", result, exact, eager(False), floor=floor)
    assert_as_exact_as(f"dots with the sum by {method}", total, exact.sum(1), eager(True), floor=floor)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size: tuple[int, int, int, int], dtype: torch.dtype, method: str) -> None:
    check(*pair(3, 2, size, dtype), method)


def test_reference_is_autograd() -> None:
    left, right = pair(3, 4, (5, 3, 7, 11), torch.float64)
    exact = by_autograd(left) @ by_autograd(right).T
    torch.testing.assert_close(dots(left, right, backend="reference"), exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_rows_and_many_samples(method: str) -> None:
    """More rows than are in flight on the left, more samples than tiles are held of on the right."""
    check(*pair(11, 19, (200, 2, 3, 700)), method)


def test_the_diagonal_is_the_norms() -> None:
    x = case(4, 30, 9, 50)
    norms = lm_head.sqnorms(x.h, x.W, x.labels, upstream=x.upstream, bias=x.bias)
    for method in METHODS:
        torch.testing.assert_close(dots(x, x, method=method).diagonal(), norms)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [(0, 2), (2, 0), (0, 0)], ids=str)
def test_empty(sizes: tuple[int, int], method: str) -> None:
    check(*pair(*sizes, (3, 4, 5, 6)), method)
    left, right = pair(2, 3, (3, 4, 5, 6))
    left = left._replace(labels=torch.full_like(left.labels, -100))
    assert torch.equal(dots(left, right, method=method), torch.zeros(2, 3))


@pytest.mark.parametrize("method", METHODS)
def test_mixed_dtypes_and_strides(method: str) -> None:
    left, right = pair(2, 3, (9, 5, 8, 40))
    check(left._replace(h=left.h.bfloat16()), right, method)
    check(left, right._replace(h=right.h.transpose(0, 2).contiguous().transpose(0, 2)), method)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_stays_in_its_sample(method: str) -> None:
    left, right = pair(3, 2, (9, 5, 8, 40))
    clean = dots(left, right, method=method)
    h = left.h.clone()
    h[1, 0, 0] = torch.nan
    result = dots(left._replace(h=h), right, method=method)
    assert not result[1].isfinite().any()
    assert torch.equal(result[::2], clean[::2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("summed", [False, True])
def test_threads_leave_the_bits(summed: bool, method: str) -> None:
    left, right = pair(4, 3, (150, 70, 20, 500))
    one, *more = at_threads((1, 2, 4), lambda: dots(left, right, method=method, summed=summed))
    assert all(torch.equal(one, other) for other in more)


def embedded(x: Case, length: int) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(x.h) * length).view(len(x.h), length) * 31 % max(len(x.W) - 1, 1)
    return ids, randn(len(x.h), length, x.h.shape[-1], dtype=x.h.dtype, seed=20)


def by_definition(ids: Tensor, g: Tensor, x: Case, padding_idx: int | None = None) -> Tensor:
    """Inner products of the float64 gradients of an embedding and of the head."""
    weight = torch.zeros(x.W.shape, dtype=torch.float64, requires_grad=True)
    head = by_autograd(x)[:, : x.W.numel()]
    values = []
    for i in range(len(ids)):
        found = torch.nn.functional.embedding(ids[i], weight, padding_idx)
        (gradient,) = torch.autograd.grad(found, weight, g[i].double())
        values.append(gradient.flatten() @ head[i])
    return torch.stack(values) if values else torch.zeros(0, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 2), (6, 5, 7, 11), (210, 260, 13, 300)], ids=str)
def test_tied_dots(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    length, T, d, V = size
    x = case(3, T, d, V, dtype)
    ids, g = embedded(x, length)
    for padding_idx in (None, 0, -1):
        result = lm_head.tied_dots(
            ids, g, x.h, x.W, x.labels, upstream=x.upstream, bias=x.bias, padding_idx=padding_idx
        )
        y, padding = wide(x), -1 if padding_idx is None else padding_idx % V
        arguments = (ids, g.to(y.h.dtype), y.h, y.labels, y.upstream, None, y.W, y.bias, padding, -100)
        eager, exact = reference.lm_head_tied_dots(*arguments), by_definition(ids, g, x, padding_idx)
        assert_as_exact_as("tied dots", result, exact, eager, floor=8 * torch.finfo(result.dtype).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tied_sqnorms(dtype: torch.dtype) -> None:
    """Of one weight that is used twice, by autograd."""
    x = case(3, 9, 7, 30, dtype, bias=False)
    ids, g = embedded(x, 11)
    result = lm_head.tied_sqnorms(ids, g, x.h, x.W, x.labels, upstream=x.upstream, padding_idx=3)
    exact = []
    for i, head in enumerate(by_autograd(x)):
        weight = torch.zeros(x.W.shape, dtype=torch.float64, requires_grad=True)
        found = torch.nn.functional.embedding(ids[i], weight, padding_idx=3)
        (gradient,) = torch.autograd.grad(found, weight, g[i].double())
        exact.append((gradient.flatten() + head).square().sum())
    torch.testing.assert_close(result, torch.stack(exact).to(result.dtype))
    cancelled = lm_head.tied_sqnorms(ids[:, :0], g[:, :0], x.h, x.W, x.labels, upstream=0 * x.upstream)
    assert torch.equal(cancelled, torch.zeros_like(cancelled))


def test_tied_dots_of_nothing_and_threads() -> None:
    x = case(3, 70, 13, 90)
    ids, g = embedded(x, 40)
    assert torch.equal(lm_head.tied_dots(ids[:, :0], g[:, :0], x.h, x.W, x.labels), torch.zeros(3))
    gone = torch.full_like(x.labels, -100)
    assert torch.equal(lm_head.tied_dots(ids, g, x.h, x.W, gone), torch.zeros(3))
    one, two = at_threads((1, 4), lambda: lm_head.tied_dots(ids, g, x.h, x.W, x.labels))
    assert torch.equal(one, two)
    strided = g.transpose(0, 2).contiguous().transpose(0, 2), x.W.T.contiguous().T
    assert torch.equal(lm_head.tied_dots(ids, strided[0], x.h, strided[1], x.labels), one)

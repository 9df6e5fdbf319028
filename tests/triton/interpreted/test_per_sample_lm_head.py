"""The Triton operators of the head's per-sample gradients against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample import lm_head as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels.per_sample import lm_head as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = {"direct": 0, "gram": 1, "auto": 3}
# (T, d, V)
SMALL, TILES = (5, 7, 11), (70, 19, 130)


def tokens(batch: int, T: int, d: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    labels = torch.arange(batch * T).view(batch, T) * 7 % V
    labels = labels.masked_fill(torch.arange(batch * T).view(batch, T) % 4 == 1, -100)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (
        randn(batch, T, d, dtype=dtype, seed=seed),
        labels,
        randn(batch, T, dtype=wide, seed=seed + 1),
        None,
    )


def head(d: int, V: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, int]:
    return (randn(V, d, seed=8) * d**-0.5).to(dtype), randn(V, dtype=dtype, seed=9), -100


def in_type(arguments: tuple, dtype: torch.dtype) -> tuple:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def check(name: str, arguments: tuple) -> None:
    result = getattr(kernels, name)(*arguments)
    formula = getattr(reference, name)
    exact, eager = formula(*in_type(arguments, torch.float64)), formula(*in_type(arguments, result.dtype))
    assert_as_exact_as(name, result, exact, eager, floor=8 * torch.finfo(result.dtype).eps)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sqnorms(dtype: torch.dtype, method: int) -> None:
    T, d, V = SMALL
    check("lm_head_sqnorms", (*tokens(2, T, d, V, dtype), *head(d, V, dtype), method))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_sqnorms_over_blocks_of_the_vocabulary(method: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK_BYTES", 0)
    T, d, _ = TILES
    check("lm_head_sqnorms", (*tokens(1, T, d, 530), *head(d, 530), method))


def test_sqnorms_without_bias_and_of_one_token() -> None:
    T, d, V = SMALL
    weight, bias, ignored = head(d, V)
    check("lm_head_sqnorms", (*tokens(2, T, d, V), weight, None, ignored, 3))
    check("lm_head_sqnorms", (*tokens(4, 1, d, V), weight, bias, ignored, 3))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dots(dtype: torch.dtype, summed: bool, method: int) -> None:
    T, d, V = SMALL
    sides = *tokens(2, T, d, V, dtype), *tokens(3, T + 2, d, V, dtype, seed=4)
    check("lm_head_dots", (*sides, *head(d, V, dtype), summed, method))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tied_dots(dtype: torch.dtype) -> None:
    for T, d, V in (SMALL, TILES):
        length = T + 3
        ids = torch.arange(2 * length).view(2, length) * 5 % V
        g = randn(2, length, d, dtype=dtype, seed=6)
        check("lm_head_tied_dots", (ids, g, *tokens(2, T, d, V, dtype), *head(d, V, dtype)[:2], 3, -100))


def test_given_log_sum_exps_and_strides() -> None:
    T, d, V = SMALL
    (h, labels, upstream, _), (weight, bias, ignored) = tokens(2, T, d, V), head(d, V)
    lse = (h @ weight.T + bias).logsumexp(-1)
    h, weight = h.transpose(0, 2).contiguous().transpose(0, 2), weight.T.contiguous().T
    check("lm_head_sqnorms", (h, labels, upstream, lse, weight, bias, ignored, 1))
    ids, g = torch.arange(8).view(4, 2).T, randn(d, 4, 2, seed=6).permute(2, 1, 0)
    check("lm_head_tied_dots", (ids, g, h, labels, upstream, lse, weight, bias, -1, ignored))


def test_rows_that_do_not_count_are_never_read() -> None:
    T, d, V = SMALL
    (h, labels, upstream, _), options = tokens(2, T, d, V), head(d, V)
    labels[1] = -100
    gone = labels == -100
    poisoned = h.masked_fill(gone[..., None], torch.nan), labels, upstream.masked_fill(gone, torch.inf), None
    for method in METHODS.values():
        expected = kernels.lm_head_sqnorms(h, labels, upstream, None, *options, method)
        assert expected[1] == 0
        assert torch.equal(kernels.lm_head_sqnorms(*poisoned, *options, method), expected)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_labels_and_ids_out_of_range_give_nan(method: int) -> None:
    T, d, V = SMALL
    (h, labels, *rest), options = tokens(2, T, d, V), head(d, V)
    labels[1, 0] = V
    result = kernels.lm_head_sqnorms(h, labels, *rest, *options, method)
    assert result.isnan().tolist() == [False, True]
    labels[1, 0] = 0
    ids = torch.zeros(2, 4, dtype=torch.long)
    ids[0, 3] = V
    tied = kernels.lm_head_tied_dots(ids, randn(2, 4, d), h, labels, *rest, *options[:2], -1, -100)
    assert tied.isnan().tolist() == [True, False]


@pytest.mark.parametrize("sizes", [(0, 3), (2, 0)], ids=str)
def test_empty(sizes: tuple[int, int]) -> None:
    batch, T = sizes
    arguments = tokens(batch, T, 4, 5)
    check("lm_head_sqnorms", (*arguments, *head(4, 5), 3))
    ids = torch.zeros(batch, 6, dtype=torch.long)
    check("lm_head_tied_dots", (ids, randn(batch, 6, 4), *arguments, *head(4, 5)[:2], -1, -100))

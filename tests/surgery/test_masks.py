import numpy as np
import pytest
import torch
from torch import Tensor

from tests.surgery.lists import flat, gradients, layouts
from unlearn_kernels import surgery
from unlearn_kernels.reference.surgery_masks import unpack
from unlearn_kernels.testing import at_threads, randn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def largest(tensors: list[Tensor], k: int) -> Tensor:
    """One flat mask by sorting pairs of (magnitude, index), NaN last."""
    size = flat(tensors).abs().tolist()
    order = sorted(range(len(size)), key=lambda i: (np.isnan(size[i]), -size[i], i))
    mask = torch.zeros(len(size), dtype=torch.bool)
    mask[order[:k]] = True
    return mask


def joined(masks: list[Tensor]) -> Tensor:
    return torch.cat([m.reshape(-1) for m in masks])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOATS), (torch.bfloat16, torch.float32), FLOATS])
def test_takes_exactly_the_largest(dtypes: tuple[torch.dtype, ...], backend: str) -> None:
    (tensors,) = gradients(1, shapes=((37, 129), (1,), (0, 3), (), (2**14 + 77,)))
    tensors = [x.to(dtypes[i % len(dtypes)]) for i, x in enumerate(tensors)]
    n = sum(x.numel() for x in tensors)
    fractions = [0.0, 0.1, 1e-4, 0.5, 0.9, 1.0]
    for fraction, masks in zip(
        fractions, surgery.topk_mask(tensors, fractions, backend=backend), strict=True
    ):
        assert [(m.shape, m.dtype) for m in masks] == [(x.shape, torch.bool) for x in tensors]
        assert torch.equal(joined(masks), largest(tensors, int(n * fraction)))


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1023, 1025, 16384, 16385, 16384 * 2 + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_are_the_mask_packed(n: int, dtype: torch.dtype) -> None:
    x = randn(n, dtype=dtype)
    for fraction in (0.0, 0.37, 1.0):
        (mask,), (bits,) = surgery.topk_mask([x], fraction), surgery.topk_mask([x], fraction, bits=True)
        assert mask.sum() == int(n * fraction)
        assert bits.numpy().tolist() == np.packbits(mask.numpy(), bitorder="little").tolist()


def test_ties_go_by_index_across_tensors_and_blocks() -> None:
    tensors = [torch.ones(3, 5), -torch.ones(40_000), torch.ones(7, dtype=torch.bfloat16)]
    n = 15 + 40_000 + 7
    for k in (0, 1, 14, 15, 16, 16_384, 30_000, n - 7, n - 1, n):
        masks = surgery.topk_mask(tensors, (k + 0.5) / n if k < n else 1.0)
        assert torch.equal(joined(masks), torch.arange(n) < k)


def test_ties_of_few_values() -> None:
    x = torch.randint(-3, 4, (50_000,), generator=torch.Generator().manual_seed(0)).to(torch.float16)
    for fraction in (0.1, 0.3, 0.85, 0.95):
        assert torch.equal(surgery.topk_mask([x], fraction)[0], largest([x], int(50_000 * fraction)))


def test_order_is_that_of_indices_whatever_the_strides() -> None:
    x = torch.randint(0, 3, (70, 33), generator=torch.Generator().manual_seed(0)).float()
    expected = largest([x], int(x.numel() * 0.4))
    for view in layouts(x).values():
        assert torch.equal(joined(surgery.topk_mask([view], 0.4)), expected)
        bits = surgery.topk_mask([view], 0.4, bits=True)[0]
        assert torch.equal(unpack(bits, x.shape), expected.view(x.shape))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_after_every_number_infinity_before(dtype: torch.dtype) -> None:
    x = randn(1000, dtype=dtype)
    x[::10] = torch.nan
    x[5], x[77], x[3], x[4] = torch.inf, -torch.inf, 0.0, -0.0
    for k in (1, 2, 500, 897, 898, 899, 900, 901, 999):
        mask = surgery.topk_mask([x], (k + 0.5) / 1000)[0]
        assert torch.equal(mask, largest([x], k))
    assert not surgery.topk_mask([x], 0.9)[0][::10].any()
    assert surgery.topk_mask([x], 0.901)[0].nonzero()[0] == 0


def test_small_numbers_are_told_apart() -> None:
    """Subnormals of every type, and float64 beside values that differ below float32's resolution."""
    x = torch.tensor([1e-45, 3e-45, -1e-45, 0.0, 1e-38, -2e-38])
    assert surgery.topk_mask([x], 0.5)[0].tolist() == [False, True, False, False, True, True]
    y = torch.tensor([1.0, 1.0 + 1e-15, 1.0 - 1e-15], dtype=torch.float64)
    one, *_ = masks = surgery.topk_mask([torch.ones(1), y], 0.25)
    assert not one.any()
    assert masks[1].tolist() == [False, True, False]


def test_each_tensor_for_itself() -> None:
    tensors = gradients(1, shapes=((50, 7), (3,), (0,), (20_000,)))[0]
    by_fraction = surgery.topk_mask(tensors, (0.5, 0.01), scope="tensor")
    for fraction, masks in zip((0.5, 0.01), by_fraction, strict=True):
        for x, mask in zip(tensors, masks, strict=True):
            assert torch.equal(mask.view(-1), largest([x], int(x.numel() * fraction)))


def test_rounds_down_the_double_product_like_saluns_code() -> None:
    x = randn(1000)
    for fraction in (0.29, 0.57, 0.58, 0.1, 1 / 3):  # 1000 * 0.58 is 580, 1000 * 0.29 is 290
        assert surgery.topk_mask([x], fraction)[0].sum() == int(1000 * fraction)
    assert surgery.topk_mask([randn(100)], 0.29)[0].sum() == 28  # 100 * 0.29 is 28.999999999999996


def test_none_takes_no_part() -> None:
    x, y = randn(100), randn(50, seed=1)
    masks = surgery.topk_mask([None, x, None, y], 0.3)
    assert masks[0] is None
    assert masks[2] is None
    assert torch.equal(joined([masks[1], masks[3]]), largest([x, y], 45))
    assert surgery.topk_mask([None], 0.5) == [None]
    assert surgery.topk_mask([], (0.5, 0.1)) == [[], []]


def test_same_bits_at_every_number_of_threads() -> None:
    tensors = [torch.randn(300_000).bfloat16(), torch.randn(200_000)]
    found = at_threads((1, 2, 4), lambda: joined(surgery.topk_mask(tensors, 0.2)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_applies(dtype: torch.dtype, bits: bool, backend: str) -> None:
    tensors = gradients(1, dtype, shapes=((37, 129), (1,), (0, 3), (), (2**14 + 77,)))[0]
    expected = [
        x * m for x, m in zip(tensors, surgery.topk_mask(tensors, 0.3), strict=True)
    ]  # SalUn's product
    masks = surgery.topk_mask(tensors, 0.3, bits=bits)
    surgery.apply_mask_(tensors, masks, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


def test_masked_elements_become_zero_whatever_they_were() -> None:
    x = torch.tensor([torch.nan, torch.inf, -1.0, 2.0, torch.nan])
    surgery.apply_mask_([x], [torch.tensor([False, False, False, True, True])])
    assert torch.equal(x[:4], torch.tensor([0.0, 0.0, 0.0, 2.0]))
    assert not x[:3].signbit().any()
    assert x[4].isnan()


@pytest.mark.parametrize("bits", [False, True])
def test_applies_to_strided_tensors_and_touches_nothing_else(bits: bool) -> None:
    x = randn(70, 33)
    mask = surgery.topk_mask([x], 0.4, bits=bits)[0]
    expected = torch.where(unpack(mask, x.shape) if bits else mask, x, 0.0)
    for view in layouts(x).values():
        surgery.apply_mask_([view], [mask])
        assert torch.equal(view, expected)
    memory = torch.full((70, 50), 7.0)
    memory[:, 5:38] = x
    surgery.apply_mask_([memory[:, 5:38]], [mask])
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 38:] == 7).all()
    assert torch.equal(memory[:, 5:38], expected)
    if not bits:
        surgery.apply_mask_([strided := x.clone()], [mask.T.contiguous().T])
        assert torch.equal(strided, expected)


def test_none_is_left_alone() -> None:
    x, y = randn(10), randn(10, seed=1)
    surgery.apply_mask_([x, None, y], [None, torch.ones(3), torch.zeros(10, dtype=torch.bool)])
    assert torch.equal(x, randn(10))
    assert (y == 0).all()


def test_errors_name_the_argument() -> None:
    x = randn(10)
    with pytest.raises(ValueError, match=r"fraction must be between 0 and 1, got 1.5"):
        surgery.topk_mask([x], 1.5)
    with pytest.raises(ValueError, match="fraction must be between 0 and 1, got nan"):
        surgery.topk_mask([x], (0.5, float("nan")))
    with pytest.raises(ValueError, match="scope must be 'global' or 'tensor', got 'row'"):
        surgery.topk_mask([x], 0.5, scope="row")
    with pytest.raises(ValueError, match=r"tensors\[1\] must be float32.*got torch.int64"):
        surgery.topk_mask([x, torch.arange(3)], 0.5)
    with pytest.raises(ValueError, match="same length, got 1 and 2"):
        surgery.apply_mask_([x], [None, None])
    with pytest.raises(ValueError, match=r"mask\[0\] must be bool, or uint8 for bits, got torch.float32"):
        surgery.apply_mask_([x], [x])
    with pytest.raises(ValueError, match=r"mask\[0\] \(bool\) must have shape \(10,\), got \(1, 10\)"):
        surgery.apply_mask_([x], [torch.ones(1, 10, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"mask\[0\] \(bits\) must have shape \(2,\), got \(1,\)"):
        surgery.apply_mask_([x], [torch.ones(1, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"tensors\[0\] is written and overlaps in memory"):
        surgery.apply_mask_([x[:6], x[4:]], [torch.ones(6, dtype=torch.bool)] * 2)

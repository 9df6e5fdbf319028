"""Rows of a store in the interpreter: the bits of the reference."""

import pytest
import torch

from unlearn_kernels.reference import influence_rows as reference
from unlearn_kernels.testing import randn
from unlearn_kernels.triton_kernels import influence_rows as kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def same(x: torch.Tensor, *settings: int | bool) -> None:
    found, expected = kernels.encode_rows(x, *settings), reference.encode_rows(x, *settings)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-14, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [0, 4, 8, 16, 32])
@pytest.mark.parametrize(("rows", "width", "block"), [(1, 1, 2), (3, 37, 6), (2, 300, 128)])
def test_rows(rows: int, width: int, block: int, bits: int, dtype: torch.dtype) -> None:
    same(randn(rows, width, dtype=dtype), bits, block, False, 0, 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("width", "block", "first"), [(37, 6, 3), (260, 128, 2**32 - 1)])
def test_rounds_at_random(width: int, block: int, first: int, bits: int) -> None:
    same(randn(3, width), bits, block, True, 2**40 + 5, first)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_odd_rows(bits: int, unbiased: bool) -> None:
    """Zeros, magnitudes whose scale is subnormal or nearly so, what is not finite; strides; no rows."""
    x = randn(6, 40)
    x[0], x[1], x[2] = 0, 1e-38, torch.arange(40) * 1.2e-38
    x[3, 7], x[4, 20], x[5, 3] = torch.nan, -torch.inf, 3e38
    same(x, bits, 16, unbiased, 1, 0)
    same(x.T.contiguous().T[:, ::2], bits, 16, unbiased, 1, 0)
    same(x[:0], bits, 16, unbiased, 1, 0)

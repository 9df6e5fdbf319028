"""The Triton kernels of normalisation layers against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample import norm as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels.per_sample import norm as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = pytest.mark.parametrize(("kind", "groups"), [(0, 1), (1, 1), (2, 2), (2, 1)])


def check(x: Tensor, g: Tensor, kind: int, groups: int, eps: float = 1e-5) -> None:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, bias in (("norm_grads", True), ("norm_sqnorms", False)):
        more = kind, groups, eps, bias
        plain = getattr(reference, name)
        result = getattr(kernels, name)(x, g, *more)
        assert result.dtype == wide
        exact = plain(x.double(), g.double(), *more)
        assert_as_exact_as(name, result, exact, plain(x.to(wide), g.to(wide), *more))


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype: torch.dtype, kind: int, groups: int) -> None:
    check(randn(2, 6, 7, dtype=dtype) + 0.5, randn(2, 6, 7, dtype=dtype, seed=1), kind, groups)


@pytest.mark.parametrize(
    ("kind", "groups", "shape"),
    [(0, 1, (1, 36, 70)), (1, 1, (1, 2, 1030)), (2, 1, (1, 2, 1100)), (2, 2, (1, 34, 5)), (2, 2, (1, 2, 1))],
    ids=str,
)
def test_many_tiles_and_parts(shape: tuple[int, ...], kind: int, groups: int) -> None:
    check(randn(*shape) + 3, randn(*shape, seed=1), kind, groups)


@KINDS
def test_mixed_types_and_strides(kind: int, groups: int) -> None:
    x = randn(9, 2, 6, dtype=torch.bfloat16).permute(1, 2, 0)
    check(x, randn(2, 6, 18, seed=1)[..., ::2], kind, groups)
    check(x[:, :1].expand(-1, 6, -1), randn(2, 6, 1, seed=2).expand(-1, -1, 9), kind, groups)


@KINDS
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0)], ids=str)
def test_empty(shape: tuple[int, ...], kind: int, groups: int) -> None:
    assert torch.equal(
        kernels.norm_sqnorms(*[torch.zeros(shape)] * 2, kind, groups, 1e-5, True), torch.zeros(shape[0])
    )


@KINDS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value: float, kind: int, groups: int) -> None:
    x, g = randn(3, 6, 7), randn(3, 6, 7, seed=1)
    clean = kernels.norm_sqnorms(x, g, kind, groups, 1e-5, True)
    g[1, 2, 3] = value
    result = kernels.norm_sqnorms(x, g, kind, groups, 1e-5, True)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])


def test_large_half_values_do_not_overflow() -> None:
    x, g = (10 * randn(2, 20, 24, dtype=torch.float64, seed=s) for s in (0, 1))
    check(x.half(), (1000 * g).half(), 0, 1)

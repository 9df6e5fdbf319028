"""The Triton embedding kernels against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample import embedding as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels.per_sample import embedding as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tokens(
    batch: int, length: int, rows: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, rows, (batch, length), generator=generator, device="cpu")
    return ids.to(torch.get_default_device()), randn(batch, length, width, dtype=dtype, seed=seed + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 7, 4, 5), (1, 20, 1, 3), (1, 3, 50, 260)], ids=str)
def test_norms_and_sums(size: tuple[int, ...], dtype: torch.dtype) -> None:
    ids, g = tokens(*size, dtype)
    w = torch.tensor([0.5, -2.0], dtype=torch.float64)[: size[0]]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for padding in (-1, 2):
        norms, total = (
            (kernels.embedding_sqnorms, reference.embedding_sqnorms),
            (
                kernels.embedding_weighted_sum,
                reference.embedding_weighted_sum,
            ),
        )
        for (call, plain), first, last in ((norms, (), ()), (total, (w,), (True,))):
            result, exact, eager = (
                f(ids, x, *first, size[2], padding, *last)
                for f, x in ((call, g), (plain, g.double()), (plain, g.to(wide)))
            )
            assert result.dtype == wide
            assert_as_exact_as(call.__name__, result, exact, eager)
    half = kernels.embedding_weighted_sum(ids, g, w, size[2], -1, False)
    exact = reference.embedding_weighted_sum(ids, g.double(), w, size[2], -1, True)
    assert_as_exact_as("sum", half, exact, exact.to(dtype))


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 7, 4, 5), (1, 20, 1, 3), (1, 3, 4, 260)], ids=str)
def test_dots(size: tuple[int, ...], dtype: torch.dtype, summed: bool) -> None:
    ids, g = tokens(*size, dtype)
    ids2, g2 = tokens(3, 5, size[2], size[3], dtype, seed=4)
    for padding in (-1, 2):
        more = size[2], padding
        result = kernels.embedding_dots(ids, g, ids2.int(), g2, *more, summed)
        exact = reference.embedding_dots(ids, g.double(), ids2, g2.double(), *more, summed)
        norms = [reference.embedding_sqnorms(i, x.double(), *more).sqrt() for i, x in ((ids, g), (ids2, g2))]
        scale = norms[0] * norms[1].sum() if summed else norms[0][:, None] * norms[1]
        assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert ((result - exact).abs() <= 4 * torch.finfo(result.dtype).eps * scale).all()


def test_strides_positions_and_mixed_types() -> None:
    ids, g = tokens(2, 6, 4, 5, torch.float32)
    exact = reference.embedding_sqnorms(ids, g, 4, -1)
    strided = g.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    torch.testing.assert_close(kernels.embedding_sqnorms(ids.T.contiguous().T, strided, 4, -1), exact)
    positions = torch.arange(6).expand(2, 6)
    torch.testing.assert_close(kernels.embedding_sqnorms(positions, g, 9, -1), g.square().sum((1, 2)))
    mixed = kernels.embedding_dots(ids, g, positions, g.bfloat16(), 9, -1, False)
    torch.testing.assert_close(mixed, reference.embedding_dots(ids, g, positions, g.bfloat16(), 9, -1, False))


def test_many_tokens_of_one_id() -> None:
    ids, g = torch.zeros(1, 600, dtype=torch.long), torch.full((1, 600, 3), 0.1)
    exact = 3 * (600 * g[0, 0, 0].double()) ** 2
    assert abs(kernels.embedding_sqnorms(ids, g, 1, -1).item() / exact.item() - 1) <= 1e-6


def test_ids_out_of_range_touch_nothing() -> None:
    ids, g = tokens(1, 6, 4, 5, torch.float32)
    wrong = torch.cat([ids, torch.tensor([[-5, 4, 1 << 40]])], 1)
    more = torch.cat([g, randn(1, 3, 5, seed=3)], 1)
    assert torch.equal(
        kernels.embedding_sqnorms(wrong, more, 4, -1), kernels.embedding_sqnorms(ids, g, 4, -1)
    )
    w = torch.ones(1, dtype=torch.float64)
    expected = kernels.embedding_weighted_sum(ids, g, w, 4, -1, True)
    assert torch.equal(kernels.embedding_weighted_sum(wrong, more, w, 4, -1, True), expected)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty(shape: tuple[int, ...]) -> None:
    ids, g, w = torch.zeros(shape[:2], dtype=torch.long), torch.zeros(shape), torch.ones(shape[0]).double()
    assert torch.equal(kernels.embedding_sqnorms(ids, g, 5, -1), torch.zeros(shape[0]))
    assert torch.equal(kernels.embedding_dots(ids, g, ids, g, 5, -1, False), torch.zeros(shape[0], shape[0]))
    assert torch.equal(kernels.embedding_weighted_sum(ids, g, w, 5, -1, True), torch.zeros(5, shape[2]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value: float) -> None:
    ids, g = tokens(3, 5, 2, 7, torch.float32)
    clean = kernels.embedding_sqnorms(ids, g, 2, -1)
    g[1, 2, 3] = value
    result = kernels.embedding_sqnorms(ids, g, 2, -1)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])

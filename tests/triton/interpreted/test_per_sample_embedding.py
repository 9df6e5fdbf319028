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
    ids = torch.randint(0, rows, (batch, length), generator=generator)
    return ids, randn(batch, length, width, dtype=dtype, seed=seed + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(2, 7, 4, 5), (1, 20, 1, 33), (2, 3, 50, 300)], ids=str)
def test_every_operator(size: tuple[int, ...], dtype: torch.dtype) -> None:
    ids, g = tokens(*size, dtype)
    ids2, g2 = tokens(3, 5, size[2], size[3], dtype, seed=4)
    w = torch.tensor([0.5, -2.0], dtype=torch.float64)[: size[0]]
    for padding in (-1, 2):
        calls = {
            "embedding_sqnorms": lambda g, _: (ids, g, size[2], padding),  # noqa: B023
            "embedding_dots": lambda g, g2: (ids, g, ids2.int(), g2, size[2], padding, False),  # noqa: B023
            "embedding_weighted_sum": lambda g, _: (ids, g, w, size[2], padding, True),  # noqa: B023
        }
        for name, arguments in calls.items():
            check(name, arguments, g, g2)
        check("embedding_dots", lambda g, g2: (ids, g, ids2, g2, size[2], padding, True), g, g2)  # noqa: B023
    half = kernels.embedding_weighted_sum(ids, g, w, size[2], -1, False)
    exact = reference.embedding_weighted_sum(ids, g.double(), w, size[2], -1, True)
    assert_as_exact_as("sum", half, exact, exact.to(dtype))


def check(name: str, arguments, g: Tensor, g2: Tensor) -> None:
    wide = torch.float64 if g.dtype == torch.float64 else torch.float32
    call, plain = getattr(kernels, name), getattr(reference, name)
    result = call(*arguments(g, g2))
    assert result.dtype == wide
    exact = plain(*arguments(g.double(), g2.double()))
    assert_as_exact_as(name, result, exact, plain(*arguments(g.to(wide), g2.to(wide))))


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

"""Projections of matrices of which only some rows are not zero."""

import pytest
import torch

from unlearn_kernels.influence import Projection
from unlearn_kernels.testing import randn, relative_error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "width"), [(40, 128), (9, 384), (40, 50), (300, 3), (5, 129)])
def test_is_the_projection_of_the_whole(count: int, width: int, dtype: torch.dtype) -> None:
    rows = torch.tensor([3, 0, count - 1])
    g = randn(4, 3, width, dtype=dtype)
    whole = torch.zeros(4, count, width, dtype=dtype)
    whole[:, rows] = g
    for k in (5, 130):
        p = Projection(count * width, k, seed=6)
        y = p.project_rows(g, rows)
        assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        error = relative_error(y, p(whole.double().flatten(1)))
        assert error <= 16 * torch.finfo(y.dtype).eps
        assert torch.equal(p.project_rows(g, rows.int()), y)
        assert relative_error(p.project_rows(g, rows, backend="reference"), y.double()) <= 1e-5


def test_no_rows_and_no_samples() -> None:
    p = Projection(60, 4)
    assert torch.equal(
        p.project_rows(torch.zeros(3, 0, 6), torch.zeros(0, dtype=torch.long)), torch.zeros(3, 4)
    )
    assert p.project_rows(torch.zeros(0, 2, 6), torch.tensor([1, 5])).shape == (0, 4)


def test_errors() -> None:
    p, g = Projection(60, 4), torch.zeros(3, 2, 6)
    with pytest.raises(
        ValueError, match=r"g must have shape \(B, n, d\) with d a divisor of 60, got \(3, 2, 7\)"
    ):
        p.project_rows(torch.zeros(3, 2, 7), torch.tensor([1, 5]))
    for width in (100, 128):
        with pytest.raises(ValueError, match="rows must be different numbers, got 3 at 0 and at 1"):
            Projection(10 * width, 4).project_rows(torch.ones(1, 2, width), torch.tensor([3, 3]))
    many = torch.arange(50_000) % 49_990
    with pytest.raises(ValueError, match=r"rows must be different numbers, got 0 at 0 and at 49990$"):
        Projection(50_000, 4).project_rows(torch.zeros(1, 50_000, 1), many)
    with pytest.raises(ValueError, match=r"rows must be in \[0, 10\), got 1 to 10"):
        p.project_rows(g, torch.tensor([1, 10]))
    with pytest.raises(ValueError, match="rows must have 2 elements, got 1"):
        p.project_rows(g, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="blocks must be a contiguous int64 vector of 2 elements"):
        torch.ops.unlearn_kernels.rademacher_project(
            torch.zeros(1, 200), 4, 0, torch.zeros(1, dtype=torch.long)
        )


def test_opcheck_and_vmap() -> None:
    op, blocks = torch.ops.unlearn_kernels.rademacher_project, torch.tensor([7, 2])
    g = randn(3, 5, 256)
    torch.library.opcheck(op.default, (g[0], 10, 7, blocks))
    batched = torch.vmap(lambda x: op(x, 10, 7, blocks))(g)
    assert torch.equal(batched, torch.stack([op(x, 10, 7, blocks) for x in g]))


@pytest.mark.parametrize("kind", ["rademacher", "sjlt", "srht"])
@pytest.mark.parametrize(("offset", "width"), [(0, 128), (256, 128), (7, 128), (130, 50), (1, 3)])
def test_a_matrix_that_is_a_part(kind: str, offset: int, width: int) -> None:
    """It begins at some coordinate and does not end with the last."""
    rows, g = torch.tensor([8, 0, 3]), randn(4, 3, width, dtype=torch.float64)
    p = Projection(offset + 9 * width + 5, 20, kind, 2)
    whole = torch.zeros(4, p.dim, dtype=torch.float64)
    whole[:, offset : offset + 9 * width].view(4, 9, width)[:, rows] = g
    assert relative_error(p.project_rows(g, rows, offset=offset), p(whole)) < 1e-12
    with pytest.raises(ValueError, match=r"rows must be in \[0, \d+\)"):
        p.project_rows(g, rows + width + 9, offset=offset)
    with pytest.raises(ValueError, match="offset must be between 0 and"):
        p.project_rows(g, rows, offset=p.dim + 1)

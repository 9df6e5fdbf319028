import io

import pytest
import torch
from torch import Tensor

from unlearn_kernels.surgery import Bases, SubspaceMemory, project_out_
from unlearn_kernels.testing import randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def orthonormal(d: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(d, k, seed=seed, dtype=torch.float64)).Q


def spread(n: int, d: int, rank: int, seed: int = 0) -> Tensor:
    """Samples whose singular values fall by half from one to the next."""
    scale = 0.5 ** torch.arange(rank, dtype=torch.float64)
    return orthonormal(n, rank, seed) * scale @ orthonormal(d, rank, seed + 1).T


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(40, 33), (33,), (8, 11, 1, 3), (1, 33), (0, 33)])
def test_takes_the_columns_space_out(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    g, M = randn(*shape, dtype=dtype), orthonormal(33, 5)
    matrix = g.double().reshape(1 if len(shape) == 1 else shape[0], 33)
    exact = (matrix - matrix @ M @ M.T).view(shape)
    project_out_([g], [M])
    rounding = relative_error(exact.to(dtype), exact)
    assert relative_error(g, exact) <= 1.05 * rounding + (1e-14 if dtype == torch.float64 else 5e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_takes_both_sides_out(dtype: torch.dtype) -> None:
    g, M, U = randn(40, 33, dtype=dtype), orthonormal(33, 5), orthonormal(40, 7, 3)
    exact = g.double() - g.double() @ M @ M.T
    exact = exact - U @ (U.T @ exact)
    project_out_([g, None, g], [Bases(M.float(), U.float()), M, None])
    assert relative_error(g, exact) < max(1e-6, 1.5 * torch.finfo(dtype).eps)


def test_strides() -> None:
    M, U = orthonormal(33, 5), orthonormal(40, 7, 3)
    plain = randn(40, 33)
    memory = torch.full((40, 50), 7.0)
    inside = memory[:, 5:38].copy_(plain)
    turned = plain.T.contiguous().T
    deep = randn(40, 33).view(40, 11, 3).permute(0, 2, 1).contiguous().permute(0, 2, 1)
    project_out_([plain, inside, turned, deep], [Bases(M, U)] * 4)
    for g in (inside, turned, deep.reshape(40, 33)):
        assert relative_error(g, plain) < 1e-6
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 38:] == 7).all()


def test_halves_are_taken_in_parts() -> None:
    g, M = randn(3, 3_000_000).bfloat16(), orthonormal(3_000_000, 1)
    exact = g.double() - (g.double() @ M) @ M.T
    project_out_([g], [M])
    assert relative_error(g, exact) < 0.004


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99, 0.999999])
def test_rank_is_the_least_that_reaches_the_threshold(threshold: float) -> None:
    R = spread(60, 30, 12)
    sigma = torch.linalg.svdvals(R).square()
    share = torch.cumsum(sigma, 0) / sigma.sum()
    memory = SubspaceMemory(threshold)
    rank = memory.update("w", R)
    assert rank == int((share < threshold).sum()) + 1
    M = memory["w"].columns.double()
    assert relative_error(M.T @ M, torch.eye(rank)) < 1e-6
    assert float((R @ M).square().sum()) >= (threshold - 1e-6) * float(R.square().sum())
    # The published code of GPM leaves the last of them out in a first task.
    published = int((torch.cumsum(sigma, 0) / sigma.sum() < threshold).sum())
    assert rank == published + 1


def test_later_samples_extend_the_basis() -> None:
    first, second = spread(60, 30, 6), spread(50, 30, 6, seed=5)
    memory = SubspaceMemory(0.99)
    one = memory.update("w", first)
    M = memory["w"].columns.double()
    both = memory.update("w", second)
    N = memory["w"].columns.double()
    assert both > one
    assert relative_error(N @ (N.T @ M), M) < 1e-6
    for R in (first, second):
        assert float((R @ N).square().sum()) >= 0.99 * float(R.square().sum()) - 1e-6
    assert memory.update("w", first) == both
    assert memory.update("w", torch.zeros(3, 30)) == both
    assert torch.equal(memory["w"].columns.double(), N) or relative_error(N @ (N.T @ M), M) < 1e-6


def test_gradients_after_projection_do_not_move_the_outputs() -> None:
    """What GPM is for: the layer's outputs on the samples stay where they were."""
    X, g = spread(100, 30, 4), randn(20, 30)
    memory = SubspaceMemory(1.0)
    assert memory.update("w", X.view(10, 10, 30)) == 4
    memory.project_({"w": g, "other": randn(3), "none": None})
    assert float((X @ g.double().T).norm()) < 1e-6


def test_rows() -> None:
    G = spread(50, 20, 3)
    memory = SubspaceMemory(1.0)
    memory.update("w", G, side="rows")
    g = randn(20, 30)
    memory.project_({"w": g})
    assert float((G @ g.double()).norm()) < 1e-6
    assert memory["w"].columns is None
    memory.update("w", randn(2, 30))
    assert memory["w"].columns.shape == (30, 2)
    assert memory["w"].rows.shape == (20, 3)


def test_rank_is_bounded() -> None:
    memory = SubspaceMemory(1.0, max_rank=3)
    assert memory.update("w", randn(10, 30)) == 3
    assert memory.update("w", randn(10, 30, seed=1)) == 3
    full = SubspaceMemory(1.0)
    assert full.update("w", randn(100, 8)) == 8
    assert full.update("w", randn(100, 8, seed=1)) == 8
    assert SubspaceMemory(0.0).update("w", randn(4, 8)) == 0


def test_saved_and_restored() -> None:
    memory = SubspaceMemory(0.9, max_rank=7)
    memory.update("a", spread(60, 30, 6))
    memory.update("b", spread(60, 20, 6), side="rows")
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    other = SubspaceMemory()
    other.load_state_dict(torch.load(file))
    assert (other.threshold, other.max_rank, set(other.names())) == (0.9, 7, {"a", "b"})
    assert torch.equal(other["a"].columns, memory["a"].columns)
    assert torch.equal(other["b"].rows, memory["b"].rows)
    assert other["b"].columns is None


def test_errors_name_the_argument() -> None:
    memory = SubspaceMemory()
    memory.update("w", randn(5, 8))
    for message, call in (
        ("threshold must be between 0 and 1, got 2", lambda: SubspaceMemory(2)),
        ("max_rank must be at least 0, got -1", lambda: SubspaceMemory(max_rank=-1)),
        ("samples of w must have 8 features, got 9", lambda: memory.update("w", randn(5, 9))),
        ("samples of v must be finite", lambda: memory.update("v", torch.full((2, 3), torch.nan))),
        ("side must be 'columns' or 'rows', got 'left'", lambda: memory.update("w", randn(5, 8), side="left")),
        ("gradients and basis must have the same length, got 1 and 2", lambda: project_out_([randn(3)], [None] * 2)),
        (r"basis\[0\] of the columns must have shape \(8, k\), got \(7, 2\)",
         lambda: project_out_([randn(5, 8)], [randn(7, 2)])),
        (r"basis\[0\] of the rows must have shape \(5, k\), got \(8, 2\)",
         lambda: project_out_([randn(5, 8)], [Bases(rows=randn(8, 2))])),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()

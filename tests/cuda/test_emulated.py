"""CUDA C++ kernels over lists and of projections, against float64."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.cuda.lists import BF16, DTYPES, F16, F32, F64, MIXES, SHAPES, doubled, lists
from unlearn_kernels.cuda_kernels import influence, surgery
from unlearn_kernels.reference import influence as projections
from unlearn_kernels.reference import surgery as plain
from unlearn_kernels.reference.surgery_adamw import surgical_adamw_
from unlearn_kernels.reference.surgery_masks import topk_mask
from unlearn_kernels.testing import assert_as_exact_as, randn, relative_error

pytestmark = pytest.mark.usefixtures("on_the_host")


@MIXES
@pytest.mark.parametrize("sets", [1, 2, 3, 8, 13])
def test_gramian(sets: int, dtypes: Sequence[torch.dtype]) -> None:
    tensors = lists(sets, dtypes)
    exact = plain.gramian(doubled(tensors), sets)
    assert relative_error(surgery.gramian(tensors, sets), exact) < 1e-6


@pytest.mark.parametrize("scope", [1, 2, 3])
@pytest.mark.parametrize("shift", [0, 1])
def test_gramian_of_segments(scope: int, shift: int) -> None:
    tensors, groups = lists(3, (BF16, F32), shift=shift), [1, 0, 0, 1, 2] if scope == 1 else []
    exact = plain.gramian(doubled(tensors), 3, scope, groups)
    found = surgery.gramian(tensors, 3, scope, groups)
    assert found.shape == exact.shape
    assert relative_error(found, exact) < 1e-6


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_gramian_beyond_the_range_of_float(size: float) -> None:
    tensors = [size * randn(5000, seed=k) for k in range(2)]
    assert relative_error(surgery.gramian(tensors, 2), plain.gramian(doubled(tensors), 2)) < 1e-6


def test_gramian_that_is_not_finite() -> None:
    a, b = torch.ones(40), torch.ones(40)
    a[3] = math.nan
    assert surgery.gramian([a, b], 2).isnan().tolist() == [[True, True], [True, False]]


@MIXES
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize("sets", [1, 3])
def test_combine(sets: int, shift: int, dtypes: Sequence[torch.dtype]) -> None:
    tensors, weights = lists(sets, dtypes, shift=shift), randn(sets, dtype=F64, seed=5)

    def run(call: Callable[..., None], inputs: list[Tensor], to: list[Tensor]) -> list[Tensor]:
        call(to, inputs, weights)
        return to

    def fresh() -> list[Tensor]:
        return [torch.empty_like(x) for x in tensors[: len(SHAPES)]]

    exact = run(plain.combine_, doubled(tensors), doubled(fresh()))
    for found, eager, e in zip(
        run(surgery.combine_, tensors, fresh()), run(plain.combine_, tensors, fresh()), exact, strict=True
    ):
        assert_as_exact_as("sum", found, e, eager)


def test_combine_by_rows() -> None:
    tensors, out = lists(2, (F32,)), lists(1, (F32,))
    segments = plain.gramian(doubled(tensors), 2, 3).shape[0]
    weights = randn(segments, 2, dtype=F64, seed=5)
    expected = doubled(out)
    surgery.combine_(out, tensors, weights, 3)
    plain.combine_(expected, doubled(tensors), weights, 3)
    for a, b in zip(out, expected, strict=True):
        assert relative_error(a, b) < 1e-6


GROUPS = torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1, 1.0], [3e-2, 0.8, 0.99, 1e-6, 0.0, -1.0]], dtype=F64)


def state(
    param: torch.dtype, moment: torch.dtype, *, shift: int = 0
) -> tuple[list[list[Tensor]], list[Tensor]]:
    params, m = lists(1, (param,), shift=shift), lists(1, (moment,), shift=shift)
    v = [x.abs() + 0.1 for x in m]
    wide = [F32, F64, F32, F32, F64]
    return [params, m, v], [torch.tensor(2.0 + i, dtype=d) for i, d in enumerate(wide)]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize(
    ("param", "moment", "gradient"),
    [
        (F32, F32, F32),
        (BF16, BF16, BF16),
        (F16, F16, F16),
        (F64, F64, F64),
        (BF16, F32, BF16),
        (F32, F32, F64),
    ],
)
def test_adamw(param: torch.dtype, moment: torch.dtype, gradient: torch.dtype, shift: int) -> None:
    gradients, weights = lists(3, (gradient,), shift=shift), torch.tensor([0.5, 0.0, -1.5], dtype=F64)

    def run(call: Callable[..., None], exact: bool) -> tuple[list[Tensor], list[Tensor]]:
        (p, m, v), steps = state(param, moment, shift=shift)
        sides: list[Any] = [p, m, v, gradients]
        if exact:
            sides = [doubled(x) for x in sides]
        call(*sides[:3], steps, sides[3], weights, GROUPS, [0, 1, 0, 1, 0], False, 7)
        return [*sides[0], *sides[1], *sides[2]], steps

    (found, steps), (eager, expected), (exact, _) = (
        run(surgery.surgical_adamw_, False),
        run(surgical_adamw_, False),
        run(surgical_adamw_, True),
    )
    assert [float(s) for s in steps] == [float(s) for s in expected]
    for a, b, c in zip(found, exact, eager, strict=True):
        assert_as_exact_as("state", a, b, c)


def test_adamw_rounds_at_random_as_every_backend() -> None:
    results = []
    for call in (surgery.surgical_adamw_, surgical_adamw_):
        (p, m, v), steps = state(BF16, F32)
        call(p, m, v, steps, lists(1, (F32,)), torch.ones(1, dtype=F64), GROUPS, [0] * 5, True, 1 << 40 | 7)
        results.append(p)
    differ = sum(int((a != b).sum()) for a, b in zip(*results, strict=True))
    assert differ <= 5  # where the last bit of the float step differs


def test_adamw_stands_still_where_a_weight_is_not_finite() -> None:
    (p, m, v), steps = state(F32, F32)
    before = [x.clone() for x in (*p, *m, *v, *steps)]
    weights = torch.tensor([math.nan], dtype=F64)
    surgery.surgical_adamw_(p, m, v, steps, lists(1, (F32,)), weights, GROUPS, [0] * 5, False, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, (*p, *m, *v, *steps), strict=True))


def numbers(dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Many ties, zeros, infinities and NaN."""
    tensors = [(2 * x).round() / 2 for x in lists(1, dtypes)]
    tensors[1][5:8] = torch.tensor([math.nan, math.inf, -math.inf])
    return tensors


@MIXES
@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("bits", [False, True])
def test_masks(dtypes: Sequence[torch.dtype], by_tensor: bool, bits: bool) -> None:
    tensors = numbers(dtypes)
    total = sum(x.numel() for x in tensors)
    counts = [0, 1, 2, 700, total - 1, total]
    if by_tensor:
        counts = [min(c, x.numel()) for c in counts for x in tensors]
    found = surgery.topk_mask(tensors, counts, by_tensor, bits)
    expected = topk_mask(tensors, counts, by_tensor, bits)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_masks_over_several_chunks() -> None:
    x = randn(40_000).mul(8).round()
    for count in (3, 20_000, 39_999):
        assert torch.equal(
            surgery.topk_mask([x], [count], False, False)[0], topk_mask([x], [count], False, False)[0]
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "dim", "k"), [(1, 1, 1), (17, 300, 9), (2, 2500, 600)])
def test_projection(batch: int, dim: int, k: int, dtype: torch.dtype) -> None:
    g, seed = randn(batch, dim, dtype=dtype), 0x0123_4567_89AB_CDEF
    found, eager = influence.rademacher_project(g, k, seed), projections.rademacher_project(g, k, seed)
    assert found.dtype == eager.dtype
    floor = math.sqrt(dim + 16) * torch.finfo(found.dtype).eps
    assert_as_exact_as("y", found, projections.rademacher_project(g.double(), k, seed), eager, floor=floor)


def test_signs_are_those_of_every_backend() -> None:
    k, dim = 16, 300
    g = torch.eye(dim)[-20:]
    y = influence.rademacher_project(g, k, 99)
    assert torch.equal(y, torch.ops.unlearn_kernels.rademacher_project(g, k, 99))


def test_projection_of_parts_blocks_and_strides() -> None:
    g, blocks = randn(3, 8192 + 200), torch.arange(66).flip(0)
    exact = projections.rademacher_project(g.double(), 5, 3, blocks)
    assert relative_error(influence.rademacher_project(g, 5, 3, blocks), exact) < 1e-6
    apart = g.T.contiguous().T
    assert torch.equal(influence.rademacher_project(apart, 5, 3), influence.rademacher_project(g, 5, 3))
    assert influence.rademacher_project(g[:0], 5, 3).shape == (0, 5)


def test_no_thread_waits_for_another_between_barriers(same_backwards) -> None:
    def run() -> list[Tensor]:
        tensors, (p, m, v), steps = lists(6, (F32, BF16)), *state(BF16, F32)
        weights = torch.ones(6, dtype=F64)
        surgery.surgical_adamw_(p, m, v, steps, tensors, weights, GROUPS, [0] * 5, True, 3)
        out = [torch.empty_like(x) for x in tensors[: len(SHAPES)]]
        surgery.combine_(out, tensors, weights)
        chosen = surgery.topk_mask(numbers((F32,)), [3, 700, 2000], False, True)
        y = influence.rademacher_project(randn(17, 300), 600, 5)
        return [*p, *m, *v, *out, *chosen, y, surgery.gramian(tensors, 6)]

    same_backwards(run)

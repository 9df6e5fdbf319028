"""Gramians, combinations and projections of tensors, groups and rows, against dense float64."""

import pytest
import torch
from torch import Tensor

from tests.surgery.lists import SHAPES, agem, clones, flat, gradients, layouts
from unlearn_kernels import surgery
from unlearn_kernels.testing import at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABELS = ("q", "k", "q", "v", "k", "q", "v")
# Rows of one element, of a few vectors, of nearly a block, of more than one; tensors without rows or elements.
ROWS = ((257, 129), (5, 16_385), (3, 9000), (40, 1), (7,), (), (2, 3, 4), (0, 5), (3, 0))


def pieces(tensors: list[Tensor], scope: str) -> list[Tensor]:
    """The float64 vector of each segment."""
    if scope == "row":
        return [y.double().flatten() for x in tensors for y in (x.unbind() if x.dim() > 1 else (x,))]
    if scope == "tensor":
        return [x.double().flatten() for x in tensors]
    return [flat([x for x, label in zip(tensors, LABELS, strict=True) if label == one]) for one in "qkv"]


def groups(scope: str) -> tuple[str, ...] | None:
    return LABELS if scope == "group" else None


def shapes(scope: str) -> tuple[tuple[int, ...], ...]:
    return ROWS if scope == "row" else SHAPES


def exact_gramians(sets: list[list[Tensor]], scope: str) -> Tensor:
    rows = [torch.stack(xs) for xs in zip(*(pieces(g, scope) for g in sets), strict=True)]
    return torch.stack([J @ J.T for J in rows])


def entry_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error of an entry, relative to the norms of its two gradients; 0 of 0 is exact."""
    size = exact.diagonal(dim1=1, dim2=2).sqrt()
    scale = size[:, :, None] * size[:, None, :]
    return float(((actual - exact).abs() / scale.where(scale > 0, 1.0)).max())


@pytest.mark.parametrize("scope", ["tensor", "group", "row"])
@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOATS), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("sets", [1, 2, 3, 5])
def test_gramians(sets: int, dtypes: tuple[torch.dtype, ...], scope: str) -> None:
    g = gradients(sets, *dtypes, shapes=shapes(scope))
    exact = exact_gramians(g, scope)
    allowed = 1e-13 if dtypes == (torch.float64,) else 1e-6
    for backend in ("cpp", "reference") if sets == 2 else ("cpp",):
        found = surgery.gramian(g, scope=scope, groups=groups(scope), backend=backend)
        assert found.shape == exact.shape
        assert entry_error(found, exact) < allowed


@pytest.mark.parametrize("name", ["transposed", "padded rows", "every other", "offset"])
def test_rows_of_other_strides(name: str) -> None:
    x, y = randn(70, 33), randn(70, 33, seed=1)
    exact = exact_gramians([[x], [y]], "row")
    for a, b in ((layouts(x)[name], y), (x, layouts(y)[name]), (layouts(x)[name], layouts(y)[name])):
        assert entry_error(surgery.gramian([[a], [b]], scope="row"), exact) < 1e-6
    f = layouts(x)[name]
    expected = torch.stack(
        [agem(a, b) if a @ b < 0 else a for a, b in zip(x.double(), y.double(), strict=True)]
    )
    surgery.project_conflict_([f], [y], scope="row")
    assert relative_error(f, expected) < 1e-7


@pytest.mark.parametrize("scope", ["tensor", "group", "row"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sets", [1, 3, 6])
def test_combinations(sets: int, dtype: torch.dtype, scope: str) -> None:
    g = gradients(sets, dtype, shapes=shapes(scope))
    w = randn(len(pieces(g[0], scope)), sets, seed=9, dtype=torch.float64)
    exact = [w[s] @ torch.stack(xs) for s, xs in enumerate(zip(*(pieces(x, scope) for x in g), strict=True))]
    size = [sum(x.norm() for x in xs) * 10 for xs in zip(*(pieces(x, scope) for x in g), strict=True)]
    made = surgery.combine(g, w, scope=scope, groups=groups(scope))
    surgery.combine_(g, w, scope=scope, groups=groups(scope))
    for out in (made, g[0]):
        assert {x.dtype for x in out} == {dtype}
        for segment, (got, expected) in enumerate(zip(pieces(out, scope), exact, strict=True)):
            rounding = (expected.to(dtype).double() - expected).norm()
            assert (got - expected).norm() <= 1.01 * rounding + 1e-15 * size[segment]


@pytest.mark.parametrize("scope", ["tensor", "group", "row"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_projects_each_segment_by_itself(dtype: torch.dtype, scope: str) -> None:
    forget, retain = gradients(2, dtype, shapes=shapes(scope))
    retain[0].mul_(-1)  # no conflict there
    before = clones(forget)
    exact = [
        agem(a, b) if a @ b < 0 else a
        for a, b in zip(pieces(forget, scope), pieces(retain, scope), strict=True)
    ]
    size = [x.norm() for x in pieces(forget, scope)]
    found = surgery.project_conflict_(forget, retain, scope=scope, groups=groups(scope))
    assert entry_error(found.gramian, exact_gramians([before, retain], scope)) < 1e-6
    for segment, (got, expected) in enumerate(zip(pieces(forget, scope), exact, strict=True)):
        w = found.weights[segment]
        assert (w[1] > 0) == (found.gramian[segment, 0, 1] < 0)
        rounding = (expected.to(dtype).double() - expected).norm()
        assert (got - expected).norm() <= 1.05 * rounding + 1e-7 * size[segment]
    if scope == "tensor":
        assert torch.equal(forget[0], before[0])
        assert torch.equal(found.weights[0], torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert found.cosine.shape == (len(exact),)
    assert found.conflict_rate == (found.gramian[:, 0, 1] < 0).double().mean()


@pytest.mark.parametrize("scope", ["tensor", "group", "row"])
def test_same_bits_at_every_number_of_threads(scope: str) -> None:
    forget, retain = gradients(2, shapes=(*shapes(scope)[:-1], (3000, 1100)))

    def project() -> Tensor:
        copies = clones(forget)
        found = surgery.project_conflict_(copies, retain, scope=scope, groups=groups(scope))
        return torch.cat([found.gramian.flatten().float(), *(x.flatten() for x in copies)])

    one, two, four = at_threads((1, 2, 4), project)
    assert torch.equal(one, two)
    assert torch.equal(one, four)


def test_tensors_in_turn_are_tensors_at_once() -> None:
    """More than fits into the cache at a time, and a clip so wide that it changes nothing but the order."""
    forget, retain = gradients(2, shapes=((1200, 1100), (5,), (1300, 1000), (0,), (900, 1000), (17, 3)))
    copies = clones(forget)
    one = surgery.project_conflict_(forget, retain, scope="tensor")
    two = surgery.project_conflict_(copies, retain, scope="tensor", max_norm=1e9)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(flat(forget), flat(copies))


def test_no_second_look_at_what_does_not_conflict() -> None:
    """Infinities of one sign: without a conflict nothing is multiplied by them."""
    forget, retain = (
        [torch.tensor([1.0, 2.0]), -randn(50).abs()],
        [torch.tensor([torch.inf, 1.0]), randn(50).abs()],
    )
    surgery.project_conflict_(forget, retain, scope="tensor")
    assert torch.equal(forget[0], torch.tensor([1.0, 2.0]))


def test_labels_may_be_anything_and_none_takes_none_of_them_away() -> None:
    forget, retain = gradients(2, shapes=((30,), (40,), (5, 5), (6,)))
    labels = [("layer", 1), None, ("layer", 1), 3]
    found = surgery.project_conflict_([forget[0], None, *forget[2:]], retain, scope="group", groups=labels)
    assert found.gramian.shape == (2, 2, 2)
    assert relative_error(found.gramian[1, 1, 1], retain[3].double().square().sum()) < 1e-6


def test_nothing_in_it() -> None:
    assert surgery.gramian([[], []], scope="tensor").shape == (0, 2, 2)
    assert surgery.gramian([[torch.empty(0, 5)]] * 2, scope="row").shape == (0, 2, 2)
    found = surgery.project_conflict_([None], [randn(3)], scope="row")
    assert (found.gramian.shape, found.weights.shape) == ((0, 2, 2), (0, 2))


def test_errors_name_the_argument() -> None:
    x = [randn(3), randn(4)]
    weights = [[1.0], [2.0], [3.0]]
    cases = [
        ("groups must be given for scope 'group' and for no other, got scope 'tensor'", "tensor", ["a", "b"]),
        ("groups must be given for scope 'group' and for no other, got scope 'group'", "group", None),
        ("groups must have one label for each of 2 tensors, got 1", "group", ["a"]),
    ]
    for message, scope, labels in cases:
        with pytest.raises(ValueError, match=message):
            surgery.gramian([x], scope=scope, groups=labels)
        with pytest.raises(ValueError, match=message):
            surgery.combine_([x], weights, scope=scope, groups=labels)
        with pytest.raises(ValueError, match=message):
            surgery.project_conflict_(x, x, scope=scope, groups=labels)
    with pytest.raises(
        ValueError, match=r"weights must have a row a segment .*, shape \(2, 1\), got \(3, 1\)"
    ):
        surgery.combine_([x], weights, scope="tensor")

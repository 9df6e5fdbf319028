"""Gradient surgery in Triton against the float64 reference."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.reference import surgery_rules as rules
from unlearn_kernels.testing import randn, relative_error
from unlearn_kernels.triton_kernels import surgery as kernels
from unlearn_kernels.triton_kernels.surgery.conflict import rule_weights

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# The interpreter cuts float32 off to bfloat16, GPUs round: about twice the error.
SLACK = {torch.bfloat16: 2.5}
SHAPES = ((7, 33), (1,), (0,), (), (1025,))
# Rule 0, global, no groups, numbers, flags, seed.
AGEM = (0, 0, [], list(rules.Options()), 0, 0)


def lists(
    sets: int, *dtypes: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES
) -> list[list[Tensor]]:
    first = [randn(*s, seed=i).double() for i, s in enumerate(shapes)]
    found = [first]
    for k in range(1, sets):
        found.append(
            [
                randn(*s, seed=10 * k + i).double() - 0.4 * f
                for i, (s, f) in enumerate(zip(shapes, first, strict=True))
            ]
        )
    return [[x.to(dtypes[k % len(dtypes)]) for x in g] for k, g in enumerate(found)]


def joined(g: list[list[Tensor]]) -> list[Tensor]:
    return [x for tensors in g for x in tensors]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.double().reshape(-1) for x in tensors])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sets", [1, 2, 3, 5, 9])
def test_gramian(dtype: torch.dtype, sets: int) -> None:
    tensors = joined(lists(sets, dtype))
    exact = reference.gramian(tensors, sets)
    assert relative_error(kernels.gramian(tensors, sets), exact) < (1e-14 if dtype == torch.float64 else 1e-7)


def test_gramian_of_several_chunks_and_mixed_types() -> None:
    g = lists(2, torch.float32, torch.bfloat16, shapes=((40_000,), (5,)))
    g[0][1], g[1][1] = g[0][1].double(), g[1][1].half()
    assert relative_error(kernels.gramian(joined(g), 2), reference.gramian(joined(g), 2)) < 1e-7


def test_gramian_of_other_orders() -> None:
    x, y = randn(33, 40), randn(33, 40, seed=1)
    for a, b in ((x.T.contiguous().T, y), (x.T.contiguous().T, y.T.contiguous().T), (x[:, ::2], y[:, 1::2])):
        assert relative_error(kernels.gramian([a, b], 2), reference.gramian([a, b], 2)) < 1e-7


@pytest.mark.parametrize("scale", [1e-30, 1e25, 0.0])
def test_gramian_squares_stay_in_range(scale: float) -> None:
    tensors = [randn(700) * scale, randn(700, seed=1)]
    G, exact = kernels.gramian(tensors, 2), reference.gramian(tensors, 2)
    assert torch.allclose(G, exact, rtol=1e-5, atol=0)


def test_gramian_of_nothing() -> None:
    empty = torch.empty(0, 3)
    assert torch.equal(kernels.gramian([empty, empty], 2), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    "dtypes", [*((d,) for d in FLOATS), (torch.bfloat16, torch.float32), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("sets", [1, 2, 5])
def test_combine(dtypes: tuple[torch.dtype, ...], sets: int) -> None:
    g = lists(sets, *dtypes)
    weights = randn(sets, seed=5).double()
    exact = [sum(w * x.double() for w, x in zip(weights, xs, strict=True)) for xs in zip(*g, strict=True)]
    kernels.combine_(g[0], joined(g), weights)
    rounded = flat([x.to(dtypes[0]) for x in exact])
    assert (
        relative_error(flat(g[0]), flat(exact))
        <= SLACK.get(dtypes[0], 1.01) * relative_error(rounded, flat(exact)) + 1e-15
    )


def test_combine_writes_strided_tensors_and_nothing_beside_them() -> None:
    memory, y = torch.full((30, 50), 7.0), randn(30, 20)
    out = memory[:, 5:25].copy_(randn(30, 20, seed=1))
    exact = 0.5 * out.double() + 2 * y
    kernels.combine_([out], [out, y], torch.tensor([0.5, 2.0], dtype=torch.float64))
    assert relative_error(out, exact) < 1e-7
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 25:] == 7).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_project_conflict(dtype: torch.dtype) -> None:
    forget, retain = lists(2, dtype)
    copies = [x.clone() for x in forget]
    expected = reference.project_conflict_(copies, retain, *AGEM)
    found = kernels.project_conflict_(forget, retain, *AGEM)
    assert expected[0][0, 1] < 0
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-7
    assert relative_error(flat(forget), flat(copies)) < torch.finfo(dtype).eps * SLACK.get(dtype, 1)


def test_no_conflict_writes_nothing() -> None:
    forget = [randn(500)]
    before = forget[0].clone()
    for retain in ([forget[0] * 2], [torch.zeros(500)]):
        _, weights, _ = kernels.project_conflict_(forget, retain, *AGEM)
        assert torch.equal(weights, torch.tensor([1.0, 0.0], dtype=torch.float64))
        assert torch.equal(forget[0], before)


def test_nan_passes() -> None:
    forget, retain = [randn(20)], [randn(20, seed=1)]
    retain[0][3] = torch.nan
    _, weights, _ = kernels.project_conflict_(forget, retain, *AGEM)
    assert weights[0] == 1
    assert weights[1].isnan()
    assert forget[0].isnan().all()


def test_overlap_is_refused() -> None:
    x = randn(30)
    with pytest.raises(RuntimeError, match="overlaps"):
        kernels.project_conflict_([x[:20]], [x[10:]], *AGEM)


SCOPES = {"group": (1, [1, 0, 1, 0, 1]), "tensor": (2, []), "row": (3, [])}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("shapes", [SHAPES, ((2, 30), (2, 17_000), (2, 3, 4), (0, 2), (40,))])
def test_segments(scope: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    tensors, (number, groups) = joined(lists(2, torch.float32, shapes=shapes)), SCOPES[scope]
    G, exact = (x.gramian(tensors, 2, number, groups) for x in (kernels, reference))
    assert G.shape == exact.shape
    assert relative_error(G, exact) < 1e-7
    w = randn(len(G), 2, seed=5).double()
    out = [torch.empty_like(x) for x in tensors[: len(shapes)]]
    plain = [x.clone() for x in out]
    kernels.combine_(out, tensors, w, number, groups)
    reference.combine_(plain, tensors, w, number, groups)
    assert relative_error(flat(out), flat(plain)) < 1e-7


def test_rows_of_another_order() -> None:
    x, y = randn(33, 40), randn(40, 33, seed=1).T
    assert relative_error(kernels.gramian([x, y], 2, 3), reference.gramian([x, y], 2, 3)) < 1e-7


RULES = [(rule, 0) for rule in range(6)] + [(rules.BLUR, rules.UPPER), (rules.GDR_GMA, 1), (rules.DOCO, 1)]


@pytest.mark.parametrize(("rule", "flags"), RULES)
@pytest.mark.parametrize("clip", [torch.inf, 3.0])
def test_rules(rule: int, flags: int, clip: float) -> None:
    """Of more segments than one block, some of them zero."""
    f, r = randn(2, 300, 5, dtype=torch.float64)
    f[:3] = 0
    r[2:5] = 0
    J = torch.stack([f, r], dim=1)
    G, options = J @ J.mT, rules.Options(1.5, 0.7, 1e-6, 0.4, 0.3, clip, clip / 2)
    found = rule_weights(G, rule, torch.tensor(options, dtype=torch.float64), flags)
    assert relative_error(found, rules.conflict_weights(G, rule, options, flags)) < 1e-13


def test_rows_are_projected_each_by_itself() -> None:
    forget, retain = lists(2, torch.float32, shapes=((6, 50), (7,)))
    copies = [x.clone() for x in forget]
    rest = (rules.GDR_GMA, 3, [], list(rules.Options(lam=0.4)), 0, 0)
    kernels.project_conflict_(forget, retain, *rest)
    reference.project_conflict_(copies, retain, *rest)
    assert relative_error(flat(forget), flat(copies)) < 1e-7


@pytest.mark.parametrize("scope", [0, 2, 4])
def test_a_step_that_is_not_finite_is_skipped(scope: int) -> None:
    forget, retain = lists(2, torch.float32)
    retain[0][0, 0] = torch.nan
    before = [x.clone() for x in forget]
    rule = rules.SAGO if scope == 4 else rules.AGEM
    found = kernels.project_conflict_(
        forget, retain, rule, scope, [], list(rules.Options()), rules.SKIP_NONFINITE, 0
    )
    assert all(torch.equal(a, b) for a, b in zip(before, forget, strict=True))
    assert found[2].isnan().all() if scope == 4 else (found[1] == torch.tensor([1.0, 0.0])).all()


@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOATS), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize(
    ("rule", "flags"), [(0, 0), (1, 0), (rules.SAGO, 0), (rules.SAGO, 4), (rules.GRADDROP, 0)]
)
def test_elements(rule: int, flags: int, dtypes: tuple[torch.dtype, ...]) -> None:
    forget, retain = lists(2, *dtypes)
    forget[0] = forget[0].T.contiguous().T
    copies = [x.clone() for x in forget]
    options = list(rules.Options(1.5, 0.25, leak_retain=0.5))
    ours, plain = (
        x.project_conflict_(f, retain, rule, 4, [], options, flags, 11)
        for x, f in ((kernels, forget), (reference, copies))
    )
    assert torch.equal(ours[2], plain[2])
    assert relative_error(flat(forget), flat(copies)) < torch.finfo(dtypes[0]).eps * SLACK.get(dtypes[0], 1)

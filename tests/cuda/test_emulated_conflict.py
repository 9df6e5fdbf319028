"""`project_conflict_` in CUDA C++: every rule and scope against float64, and single elements against the reference."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.cuda.lists import BF16, DTYPES, F16, F32, F64, MIXES, SHAPES, doubled, lists
from unlearn_kernels.cuda_kernels import surgery
from unlearn_kernels.reference import surgery as plain
from unlearn_kernels.reference import surgery_elements
from unlearn_kernels.reference import surgery_rules as rules
from unlearn_kernels.testing import assert_as_exact_as, randn, relative_error
from unlearn_kernels.triton_kernels.surgery.elements import ElementRule
from unlearn_kernels.triton_kernels.surgery.tables import ELEMENT, ROW, TENSOR, table_of

pytestmark = pytest.mark.usefixtures("on_the_host")
Lists = tuple[list[Tensor], list[Tensor]]
RULES = [(rule, 0) for rule in range(6)] + [(rules.BLUR, rules.UPPER), (rules.GDR_GMA, 1), (rules.DOCO, 1)]
SCOPES = pytest.mark.parametrize(
    ("scope", "groups"), [(0, []), (1, [1, 0, 0, 1, 2]), (TENSOR, []), (ROW, [])], ids=str
)
AGEM = (0, 0, [], list(rules.Options()), 0, 0)


def pair(dtypes: Sequence[torch.dtype], *, shift: int = 0) -> Lists:
    """Two lists that work against each other."""
    tensors = lists(2, dtypes, shift=shift)
    forget, retain = tensors[: len(SHAPES)], tensors[len(SHAPES) :]
    for f, r in zip(forget, retain, strict=True):
        r.sub_(0.4 * f)
    return forget, retain


def copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def compare(forget: list[Tensor], retain: list[Tensor], *rest: Any) -> None:
    """As near to float64 as the reference is."""
    eager, exact = copied(forget), copied(doubled(forget))
    expected = plain.project_conflict_(exact, doubled(retain), *rest)
    plain.project_conflict_(eager, retain, *rest)
    found = surgery.project_conflict_(forget, retain, *rest)
    for name, a, b in zip(("gramian", "weights", "rates"), found, expected, strict=True):
        assert a.dtype == F64, name
        assert relative_error(a, b) < 1e-6, name
    floor = max(4 * torch.finfo(f.dtype).eps for f in forget)
    assert_as_exact_as(
        "f", *(torch.cat([y.double().flatten() for y in x]) for x in (forget, exact, eager)), floor=floor
    )


@SCOPES
@pytest.mark.parametrize("clip", [math.inf, 3.0])
@pytest.mark.parametrize(("rule", "flags"), RULES)
def test_rules(rule: int, flags: int, clip: float, scope: int, groups: list[int]) -> None:
    options = list(rules.Options(1.5, 0.7, 1e-6, 0.4, 0.3, clip, clip / 2))
    compare(*pair((F32,)), rule, scope, groups, options, flags, 0)


@MIXES
@pytest.mark.parametrize("shift", [0, 3])
@SCOPES
def test_types(dtypes: Sequence[torch.dtype], shift: int, scope: int, groups: list[int]) -> None:
    options = list(rules.Options(1.5, 0.7))
    compare(*pair(dtypes, shift=shift), rules.PCGRAD, scope, groups, options, 0, 0)


@pytest.mark.parametrize("clip", [math.inf, 2.0])
def test_more_segments_than_threads(clip: float) -> None:
    forget, retain = [randn(700, 3), randn(5)], [randn(700, 3, seed=1), randn(5, seed=2)]
    forget[0][:3] = 0
    retain[0][2:5] = 0
    compare(forget, retain, 3, ROW, [], list(rules.Options(1.2, 0.4, max_norm=clip)), 0, 0)


def test_several_chunks_and_other_orders() -> None:
    memory = torch.full((30, 50), 7.0)
    forget = [randn(40_000), randn(33, 40).T, memory[:, 5:25].copy_(randn(30, 20, seed=3))]
    retain = [randn(40_000, seed=4) - forget[0], randn(40, 33, seed=5), randn(30, 20, seed=6).half()]
    compare(forget, retain, *AGEM)
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 25:] == 7).all()


@pytest.mark.parametrize("skip", [0, rules.SKIP_NONFINITE])
def test_no_conflict_writes_nothing(skip: int) -> None:
    """A write would make 0 of -0."""
    forget = [torch.full((500,), -0.0), randn(70)]
    before = copied(forget)
    for retain in (copied(forget), [torch.zeros_like(x) for x in forget]):
        weights = surgery.project_conflict_(forget, retain, 0, TENSOR, [], AGEM[3], skip, 0)[1]
        assert torch.equal(weights, torch.tensor([[1.0, 0.0]] * 2, dtype=F64))
        assert torch.equal(forget[1], before[1])
        assert forget[0].signbit().all()


def test_a_list_of_weight_0_is_not_read() -> None:
    forget, retain = [randn(500)], [torch.full((500,), math.nan)]
    expected = 2 * forget[0]
    surgery._combine(table_of([forget, retain]), 0, torch.tensor([[2.0, 0.0]], dtype=F64), True, True)
    assert torch.equal(forget[0], expected)


def test_nan_passes() -> None:
    forget, retain = [randn(20)], [randn(20, seed=1)]
    retain[0][3] = torch.nan
    weights = surgery.project_conflict_(forget, retain, *AGEM)[1]
    assert weights[0] == 1
    assert weights[1].isnan()
    assert forget[0].isnan().all()


@pytest.mark.parametrize("scope", [0, TENSOR, ROW, ELEMENT])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(scope: int, bad: float) -> None:
    forget, retain = pair((F32,))
    retain[0][0, 0] = bad
    before = copied(forget)
    rule = rules.SAGO if scope == ELEMENT else rules.AGEM
    found = surgery.project_conflict_(forget, retain, rule, scope, [], AGEM[3], rules.SKIP_NONFINITE, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, forget, strict=True))
    assert found[2].isnan().all() if scope == ELEMENT else (found[1] == torch.tensor([1.0, 0.0])).all()


def test_overlap_is_refused() -> None:
    x = randn(30)
    with pytest.raises(RuntimeError, match="overlaps"):
        surgery.project_conflict_([x[:20]], [x[10:]], *AGEM)


def test_nothing() -> None:
    empty = torch.empty(0, 3)
    G, weights, _ = surgery.project_conflict_([empty], [empty], *AGEM)
    assert torch.equal(G, torch.zeros(2, 2, dtype=F64))
    assert torch.equal(weights, torch.tensor([1.0, 0.0], dtype=F64))
    assert surgery.project_conflict_([empty], [empty], 0, ROW, *AGEM[2:])[0].shape == (0, 2, 2)
    assert surgery.project_conflict_([empty], [empty], rules.SAGO, ELEMENT, *AGEM[2:])[2].tolist() == [0.0]


ELEMENTS = [(0, 0), (1, 0), (rules.SAGO, 0), (rules.SAGO, rules.KEEP_RETAIN), (rules.GRADDROP, 0)]
LEAKY = list(rules.Options(1.5, 0.25, leak_forget=0.25, leak_retain=0.5))


@MIXES
@pytest.mark.parametrize("shift", [0, 3])
@pytest.mark.parametrize(("rule", "flags"), ELEMENTS)
def test_elements(rule: int, flags: int, shift: int, dtypes: Sequence[torch.dtype]) -> None:
    """The products round as in the reference: all bits are its."""
    forget, retain = pair(dtypes, shift=shift)
    forget[4] = forget[4].T.contiguous().T
    plain_forget = copied(forget)
    rest = (rule, ELEMENT, [], LEAKY, flags, 11)
    found = surgery.project_conflict_(forget, retain, *rest)
    expected = plain.project_conflict_(plain_forget, retain, *rest)
    assert torch.equal(found[2], expected[2])
    assert found[0].shape == (0, 2, 2)
    assert found[1].shape == (0, 2)
    assert all(torch.equal(a, b) for a, b in zip(forget, plain_forget, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_graddrop_draws_what_the_cpu_draws(dtype: torch.dtype) -> None:
    forget, retain = pair((dtype,))
    ours, rest = copied(forget), (rules.GRADDROP, ELEMENT, [], LEAKY, 0, 1 << 40 | 7)
    surgery.project_conflict_(ours, retain, *rest)
    torch.ops.unlearn_kernels.project_conflict_(forget, retain, *rest)
    assert all(torch.equal(a, b) for a, b in zip(ours, forget, strict=True))


def test_graddrop_keeps_what_agrees() -> None:
    """Also where the number drawn is 0, as it is at index 50919 of this seed."""
    for sign in (1.0, -1.0):
        f, r = (torch.full((50924,), sign) for _ in range(2))
        surgery.project_conflict_([f], [r], rules.GRADDROP, ELEMENT, [], AGEM[3], 0, 283)
        assert bool((f == 2 * sign).all())


def test_numbers_of_elements_beyond_2_to_the_34() -> None:
    """There the counter has a second word."""
    first, seed = (1 << 36) + 20, 5
    f, r = randn(100), randn(100, seed=1)
    expected = surgery_elements._drop(f, r, rules.Options(), surgery_elements.uniforms(seed, first, 100))
    rule = ElementRule(drop=True, drops_clashes=False, agree=False)
    numbers = torch.tensor(rules.Options(), dtype=F64)
    surgery._act(table_of([[f], [r]], TENSOR), torch.tensor([first]), None, numbers, seed, rule)
    assert torch.equal(f, expected)


def test_elements_without_a_sign() -> None:
    values = torch.tensor([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 2.0, -3.0])
    f, r = values.repeat(9), values.repeat_interleave(9)
    for rule, flags in ELEMENTS:
        a, b = f.clone(), f.clone()
        rest = (rule, ELEMENT, [], LEAKY, flags, 3)
        rates = [x.project_conflict_([y], [r], *rest)[2] for x, y in ((surgery, a), (plain, b))]
        assert torch.equal(*rates)
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_no_thread_waits_for_another_between_barriers(same_backwards) -> None:
    def run() -> list[Tensor]:
        found: list[Tensor] = []
        clipped = list(rules.Options(1.5, 0.7, max_norm=3.0, leak_retain=0.5))
        for rule, scope in ((0, 0), (1, ROW), (3, TENSOR), (rules.SAGO, ELEMENT), (rules.GRADDROP, ELEMENT)):
            forget, retain = pair((F32, BF16, F16))
            skip = rules.SKIP_NONFINITE
            found += [*surgery.project_conflict_(forget, retain, rule, scope, [], clipped, skip, 9), *forget]
        return found

    same_backwards(run)

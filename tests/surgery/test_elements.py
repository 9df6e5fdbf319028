"""Rules for single elements against their definitions."""

import pytest
import torch
from torch import Tensor

from tests.surgery.lists import SHAPES, clones, flat, gradients, layouts
from unlearn_kernels import surgery
from unlearn_kernels.reference import surgery_elements as reference
from unlearn_kernels.testing import at_threads, randn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sago(f: Tensor, r: Tensor, gamma: float, alpha: float, keep_retain: bool) -> Tensor:
    """As published, with boolean indexing, in the gradients' type."""
    conflict = f.sign() * r.sign() < 0
    out = gamma * f + alpha * r if keep_retain else gamma * f
    out[conflict] = alpha * r[conflict]
    return out


@pytest.mark.parametrize("keep_retain", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_sago_is_the_published_loop(backend: str, dtype: torch.dtype, keep_retain: bool) -> None:
    forget, retain = gradients(2, dtype, shapes=(*SHAPES, (0, 4), (16_384,), (2047,), (16_384 + 4099,)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = [
        sago(f.to(wide), r.to(wide), 1.5, 0.25, keep_retain).to(dtype)
        for f, r in zip(forget, retain, strict=True)
    ]
    rates = [((f * r) < 0).double().mean().nan_to_num() for f, r in zip(forget, retain, strict=True)]
    found = surgery.project_conflict_(
        forget, retain, rule="sago", gamma=1.5, alpha=0.25, keep_retain=keep_retain, backend=backend
    )
    for got, exact in zip(forget, expected, strict=True):
        if keep_retain and backend == "cpp":  # one rounding where torch has two
            torch.testing.assert_close(got, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        else:
            assert torch.equal(got, exact)
    torch.testing.assert_close(found.rates, torch.stack(rates), rtol=1e-12, atol=0)
    assert found.conflict_rate == found.rates.mean()
    assert found.gramian.shape == (0, 2, 2)


def test_signs_and_not_products() -> None:
    """A product that underflows has no sign, zeros agree with everything."""
    f = torch.tensor([1e-30, -1e-30, 0.0, -0.0, 2.0, torch.nan, -torch.inf])
    r = torch.tensor([-1e-30, -1e-30, -1.0, 1.0, 0.0, -1.0, 1.0])
    found = surgery.project_conflict_([f], [r], rule="sago", gamma=3.0)
    expected = torch.tensor([-1e-30, -3e-30, 0.0, -0.0, 6.0, torch.nan, 1.0])
    torch.testing.assert_close(f, expected, rtol=1e-7, atol=0, equal_nan=True)
    assert float(found.rates) == pytest.approx(2 / 7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_projection_of_single_numbers(dtype: torch.dtype) -> None:
    forget, retain = gradients(2, dtype)
    one, two = clones(forget), clones(forget)
    surgery.project_conflict_(one, retain, scope="element")
    surgery.project_conflict_(two, retain, rule="pcgrad", scope="element")
    for f, r, a, b in zip(forget, retain, one, two, strict=True):
        conflict = f.sign() * r.sign() < 0
        assert torch.equal(a, torch.where(conflict, 0, f))
        assert torch.equal(b, torch.where(conflict, 0, (f.double() + r.double()).to(dtype)))


def drop(f: Tensor, r: Tensor, u: Tensor, leak: tuple[float, float]) -> Tensor:
    """GradDrop of two gradients, float64, from its definition."""
    f, r, u = f.double(), r.double(), u.double().view(f.shape)
    p = (1 + (f + r) / (f.abs() + r.abs())) / 2
    masks = [torch.where(x > 0, p > u, p <= u).double() for x in (f, r)]
    return sum((s + (1 - s) * m) * x for s, m, x in zip(leak, masks, (f, r), strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_graddrop_is_its_definition(backend: str, dtype: torch.dtype) -> None:
    forget, retain = gradients(2, dtype, shapes=((33, 7), (1,), (5,), (2100,)))
    starts = (0, 232, 236, 244)
    expected = [
        drop(f, r, reference.uniforms(7, start, f.numel()), (0.0, 0.25))
        for start, f, r in zip(starts, forget, retain, strict=True)
    ]
    surgery.project_conflict_(forget, retain, rule="graddrop", seed=7, leak=(0.0, 0.25), backend=backend)
    for got, exact in zip(forget, expected, strict=True):
        torch.testing.assert_close(got, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_graddrop_keeps_what_agrees(backend: str) -> None:
    """Also where the number drawn is 0, as it is at one index of this seed."""
    at = 50919
    assert reference.uniforms(283, 0, at + 1)[at] == 0
    for sign in (1.0, -1.0):
        f, r = (torch.full((at + 5,), sign) for _ in range(2))
        surgery.project_conflict_([f], [r], rule="graddrop", seed=283, backend=backend)
        assert bool((f == 2 * sign).all())


def test_graddrops_numbers_belong_to_indices() -> None:
    """Not to the order in memory."""
    f, r = randn(70, 33), randn(70, 33, seed=1)
    plain = f.clone()
    surgery.project_conflict_([plain], [r], rule="graddrop", seed=3)
    for name, other in layouts(f).items():
        surgery.project_conflict_([other], [layouts(r)["transposed"]], rule="graddrop", seed=3)
        assert torch.equal(other, plain), name
    surgery.project_conflict_([f], [r], rule="graddrop", seed=4)
    assert not torch.equal(f, plain)


def test_graddrop_keeps_the_mean() -> None:
    """Each sign survives with the probability that makes the expectation the sum scaled."""
    f, r = torch.full((200_000,), 3.0), torch.full((200_000,), -1.0)
    surgery.project_conflict_([f], [r], rule="graddrop")
    assert set(f.tolist()) == {3.0, -1.0}
    assert abs(float((f == 3.0).double().mean()) - 0.75) < 0.005


def test_uniforms_are_uniform() -> None:
    u = reference.uniforms(1, 0, 100_000)
    assert 0 <= u.min() < u.max() < 1
    counts = torch.histc(u, 50, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 100
    far = reference.uniforms(1, 2**34 + 8, 4)
    assert not torch.equal(far, reference.uniforms(1, 8, 4))


@pytest.mark.parametrize("rule", ["sago", "graddrop"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64)])
def test_mixed_dtypes_and_strides(rule: str, dtypes: tuple[torch.dtype, ...]) -> None:
    forget, retain = gradients(2, *dtypes, shapes=((70, 33), (2000,)))
    copies = clones(forget)
    surgery.project_conflict_(copies, retain, rule=rule, backend="reference")
    for name in layouts(forget[0]):
        f = [layouts(forget[0])[name], forget[1].clone()]
        surgery.project_conflict_(f, [layouts(retain[0])["every other"], retain[1]], rule=rule)
        assert torch.equal(flat(f), flat(copies)), name


@pytest.mark.parametrize("rule", ["sago", "graddrop"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_every_number_of_threads(rule: str, dtype: torch.dtype) -> None:
    forget, retain = gradients(2, dtype, shapes=(*SHAPES, (300_000,)))

    def project() -> Tensor:
        copies = clones(forget)
        found = surgery.project_conflict_(copies, retain, rule=rule)
        return torch.cat([found.rates.to(dtype), *(x.view(-1) for x in copies)])

    one, two, four = at_threads((1, 2, 4), project)
    assert torch.equal(one, two)
    assert torch.equal(one, four)

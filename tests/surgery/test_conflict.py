import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.surgery.lists import SHAPES, agem, clones, exact_gramian, flat, gradients, layouts
from unlearn_kernels import surgery
from unlearn_kernels.testing import at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def harmony(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Two sets that do not conflict."""
    forget, retain = gradients(2, dtype)
    return [forget, [-x for x in retain]]


def cosine(x: list[Tensor], y: list[Tensor]) -> float:
    a, b = flat(x), flat(y)
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_projects_as_defined(dtype: torch.dtype, backend: str) -> None:
    forget, retain = gradients(2, dtype)
    G = exact_gramian([forget, retain])
    exact = agem(flat(forget), flat(retain))
    kept = clones(retain)
    found = surgery.project_conflict_(forget, retain, backend=backend)
    assert relative_error(found.gramian, G) < 1e-6
    assert relative_error(found.weights, torch.stack([torch.ones(()), -G[0, 1] / G[1, 1]])) < 1e-6
    assert abs(float(found.cosine - G[0, 1] / (G[0, 0] * G[1, 1]).sqrt())) < 1e-6
    assert relative_error(flat(forget), exact) <= 1.05 * relative_error(exact.to(dtype), exact) + 1e-12
    assert torch.equal(flat(kept), flat(retain))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_float32_keeps_no_conflict(backend: str) -> None:
    forget, retain = gradients(2, shapes=((1000, 300), (777,)))
    assert cosine(forget, retain) < -0.2
    surgery.project_conflict_(forget, retain, backend=backend)
    assert abs(cosine(forget, retain)) <= 1e-8


def test_projecting_twice_changes_next_to_nothing() -> None:
    forget, retain = gradients(2)
    surgery.project_conflict_(forget, retain)
    once = flat(forget)
    surgery.project_conflict_(forget, retain)
    assert relative_error(flat(forget), once) < 1e-7


@pytest.mark.parametrize("dtype", FLOATS)
def test_writes_nothing_without_conflict(dtype: torch.dtype) -> None:
    forget, retain = harmony(dtype)
    before = clones(forget)
    found = surgery.project_conflict_(forget, retain)
    assert found.cosine > 0.2
    assert torch.equal(found.weights, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(before, forget, strict=True))


def test_read_only_memory_survives_where_nothing_conflicts() -> None:
    code = """
import mmap, torch
from unlearn_kernels import surgery
memory = mmap.mmap(-1, 1 << 20, prot=mmap.PROT_READ)
import warnings; warnings.simplefilter("ignore")
f = torch.frombuffer(memory, dtype=torch.float32)
surgery.project_conflict_([f], [torch.ones_like(f)])
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "survived" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["transposed", "padded rows", "every other", "offset"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(name: str, dtype: torch.dtype) -> None:
    forget, retain = gradients(2, dtype, shapes=((257, 129),))
    exact = agem(flat(forget), flat(retain))
    rounded = relative_error(exact.to(dtype), exact)
    for f, r in ((layouts(forget[0])[name], retain[0]), (forget[0], layouts(retain[0])[name])):
        f = f.clone() if f is forget[0] else f
        surgery.project_conflict_([f], [r])
        assert relative_error(f, exact.view_as(f)) <= 1.05 * rounded + 1e-12


def test_mixed_dtypes() -> None:
    forget, retain = gradients(2, torch.float32, torch.bfloat16)
    exact = agem(flat(forget), flat(retain))
    surgery.project_conflict_(forget, retain)
    assert {x.dtype for x in forget} == {torch.float32}
    assert relative_error(flat(forget), exact) < 1e-7


def test_none_gradients() -> None:
    forget, retain = gradients(2, shapes=((50, 20), (30,), (40, 4), (9,)))
    a, _, c, d = (x.clone() for x in forget)
    exact = agem(flat([a, c, d]), torch.cat([flat(retain[:1]), torch.zeros(160), flat(retain[3:])]))
    found = surgery.project_conflict_([a, None, c, d], [retain[0], retain[1], None, retain[3]])
    assert found.weights[1] > 0
    assert relative_error(flat([a, c, d]), exact) < 1e-7
    assert torch.equal(c, forget[2])
    assert relative_error(found.gramian[0, 0], flat([forget[0], *forget[2:]]).square().sum()) < 1e-6
    none = surgery.project_conflict_([None, None], [None, randn(3)])
    assert torch.equal(none.gramian, torch.zeros(2, 2, dtype=torch.float64))
    assert torch.equal(none.weights, torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert none.cosine == 0


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_zero_gradients(backend: str) -> None:
    for forget, retain in (([randn(99)], [torch.zeros(99)]), ([torch.zeros(99)], [randn(99)])):
        before = clones(forget)
        found = surgery.project_conflict_(forget, retain, backend=backend)
        assert torch.equal(forget[0], before[0])
        assert found.weights[1] == 0
        assert found.cosine == 0


@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_is_the_formulas(where: str, value: float) -> None:
    forget, retain = gradients(2, shapes=((3000,), (5,)))
    (forget if where == "forget" else retain)[0][17] = value
    expected = clones(forget)
    plain = surgery.project_conflict_(expected, retain, backend="reference")
    found = surgery.project_conflict_(forget, retain)
    torch.testing.assert_close(found.gramian, plain.gramian, equal_nan=True, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights, plain.weights, equal_nan=True, rtol=1e-6, atol=0)
    for ours, theirs in zip(forget, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_nan_in_retain_is_not_hidden() -> None:
    forget, retain = gradients(2)
    retain[0][0, 0] = float("nan")
    surgery.project_conflict_(forget, retain)
    assert all(x.isnan().all() for x in forget)


def test_forget_may_be_retain() -> None:
    x = gradients(1)[0]
    before = clones(x)
    found = surgery.project_conflict_(x, x)
    assert abs(float(found.cosine) - 1) < 1e-12
    assert torch.equal(flat(x), flat(before))


def test_one_tensor_may_be_shared() -> None:
    forget, retain = gradients(2, shapes=((3000,), (10,)))
    shared = randn(10)
    exact = agem(flat([forget[0], shared]), flat([retain[0], shared]))
    surgery.project_conflict_([forget[0], shared], [retain[0], shared])
    assert relative_error(flat([forget[0], shared]), exact) < 1e-7


def test_overlap_is_refused_and_named() -> None:
    memory, x = randn(100), randn(50)
    before = memory.clone()
    cases = [
        (r"forget\[0\] is written and overlaps in memory with retain\[0\]", [memory[:50]], [memory[25:75]]),
        (
            r"forget\[2\] is written and overlaps in memory with retain\[3\]",
            [None, x, memory[:50], x.clone()],
            [x, -x, -x, memory[:50]],
        ),
        (
            r"forget\[\d\] is written and overlaps in memory with itself or another",
            [memory[:50], memory[:50]],
            [-x, -x],
        ),
    ]
    for message, forget, retain in cases:
        with pytest.raises(ValueError, match=message):
            surgery.project_conflict_(forget, retain)
    assert torch.equal(memory, before)


def test_scaling_retain_changes_nothing() -> None:
    forget, retain = gradients(2)
    other = clones(forget)
    surgery.project_conflict_(forget, retain)
    surgery.project_conflict_(other, [1024 * x for x in retain])
    assert torch.equal(flat(forget), flat(other))


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_at_every_number_of_threads(dtype: torch.dtype) -> None:
    forget, retain = gradients(2, dtype, shapes=(*SHAPES, (300_000,)))

    def project() -> Tensor:
        copies = clones(forget)
        surgery.project_conflict_(copies, retain)
        return torch.cat([x.view(-1) for x in copies])

    one, two, four = at_threads((1, 2, 4), project)
    assert torch.equal(one, two)
    assert torch.equal(one, four)


def test_gradients_of_a_module() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 5))
    loss = [model(randn(8, 20, seed=s)).square().mean() * sign for s, sign in ((0, -1), (1, 1))]
    forget, retain = (torch.autograd.grad(x, list(model.parameters())) for x in loss)
    exact = agem(flat(list(forget)), flat(list(retain)))
    found = surgery.project_conflict_(forget, retain)
    assert found.cosine < 0
    assert relative_error(flat(list(forget)), exact) < 1e-6


def test_version_counters_tell_autograd() -> None:
    x = randn(5).requires_grad_()
    forget = x.detach().clone()
    y = (x * forget).sum()
    surgery.project_conflict_([forget], [-forget])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_inference_mode() -> None:
    with torch.inference_mode():
        forget, retain = gradients(2)
        surgery.project_conflict_(forget, retain)
        assert abs(cosine(forget, retain)) < 1e-7


def test_errors_name_the_argument() -> None:
    x = randn(3)
    with pytest.raises(ValueError, match="forget and retain must have the same length, got 1 and 2"):
        surgery.project_conflict_([x], [x, x])
    with pytest.raises(
        ValueError, match=r"forget\[2\] and retain\[2\] must have one shape, got \(3,\) and \(4,\)"
    ):
        surgery.project_conflict_([x, None, x], [x, x, randn(4)])
    with pytest.raises(ValueError, match=r"forget\[0\] must be float32, .* got torch.int64"):
        surgery.project_conflict_([x.long()], [x])
    with pytest.raises(ValueError, match=r"retain\[2\] must be float32, .* got torch.int64"):
        surgery.project_conflict_([x, None, x], [x, x, x.long()])
    with pytest.raises(ValueError, match=r"rule must be 'agem' or .* or 'graddrop', got 'mgda'"):
        surgery.project_conflict_([x], [x], rule="mgda")

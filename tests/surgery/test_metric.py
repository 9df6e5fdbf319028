import pytest
import torch
from torch import Tensor

from tests.surgery.lists import clones, flat, gradients
from unlearn_kernels import surgery
from unlearn_kernels.testing import at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((37, 129), (1,), (0, 3), (), (20_011,))


def moments(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(randn(*s, seed=70 + i) ** 2 + 1e-3).to(dtype) for i, s in enumerate(SHAPES)]


def exact_gramian(
    sets: list[list[Tensor]], seconds: list[Tensor], eps: float, correction: float = 1.0
) -> Tensor:
    J = torch.stack([flat(g) for g in sets])
    return (J / ((flat(seconds) / correction).sqrt() + eps)) @ J.T


def assert_gramian(found: Tensor, exact: Tensor, bound: float = 1e-6) -> None:
    size = exact.diagonal().sqrt()
    assert float(((found - exact).abs() / torch.outer(size, size)).max()) < bound


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sets", [1, 2, 3, 5, 9])
def test_matches_float64(sets: int, dtype: torch.dtype, backend: str) -> None:
    g, v = gradients(sets, dtype, shapes=SHAPES), moments()
    found = surgery.weighted_gramian(g, v, eps=1e-3, backend=backend)
    assert torch.equal(found, found.T)
    assert_gramian(found, exact_gramian(g, v, 1e-3), 1e-12 if dtype == torch.float64 else 1e-6)


def test_bias_correction_and_mixed_types() -> None:
    g, v = gradients(2, torch.bfloat16, torch.float32, shapes=SHAPES), moments(torch.bfloat16)
    for steps in (7, torch.tensor(7.0), [7.0] * len(SHAPES)):
        found = surgery.weighted_gramian(g, v, beta2=0.9, steps=steps)
        assert_gramian(found, exact_gramian(g, v, 1e-8, 1 - 0.9**7))


def test_strides_and_sizes() -> None:
    for n in (0, 1, 7, 1023, 1025, 16385):
        g, v = [[randn(n)], [randn(n, seed=1)]], [randn(n, seed=2) ** 2]
        found = surgery.weighted_gramian(g, v, eps=0.1)
        assert relative_error(found, exact_gramian(g, v, 0.1)) < 1e-6
    a, b, v = randn(40, 33), randn(40, 33, seed=1), randn(40, 33, seed=2) ** 2
    found = surgery.weighted_gramian([[a.T.contiguous().T], [b]], [torch.stack([v, v], -1)[..., 0]], eps=0.1)
    assert relative_error(found, exact_gramian([[a], [b]], [v], 0.1)) < 1e-6


@pytest.mark.parametrize("scale", [1e-28, 1e25, 0.0])
def test_squares_stay_in_range(scale: float) -> None:
    g, v = [[randn(3000) * scale], [randn(3000, seed=1)]], [torch.ones(3000)]
    found = surgery.weighted_gramian(g, v)
    assert torch.allclose(found, exact_gramian(g, v, 1e-8), rtol=1e-5, atol=0)


def test_non_finite_and_negative_pass() -> None:
    g, v = [[randn(2000)], [randn(2000, seed=1)]], [torch.ones(2000)]
    v[0][7] = -1
    assert surgery.weighted_gramian(g, v).isnan().all()
    v[0][7], g[0][0][3] = 1, torch.inf
    found = surgery.weighted_gramian(g, v)
    assert found[0, 0] == torch.inf
    assert found[1, 1].isfinite()


def test_same_bits_at_every_number_of_threads() -> None:
    g, v = gradients(3, shapes=((300_000,),)), [randn(300_000, seed=9) ** 2]
    one, two, four = at_threads((1, 2, 4), lambda: surgery.weighted_gramian(g, v))
    assert torch.equal(one, two)
    assert torch.equal(one, four)


@pytest.mark.parametrize("directions", [1, 3, 8])
@pytest.mark.parametrize("metric", [False, True])
def test_span_is_left(directions: int, metric: bool) -> None:
    gradient, *rest = gradients(directions + 1, shapes=SHAPES)
    v = moments()
    kept = [clones(r) for r in rest]
    H = 1 / (flat(v).sqrt() + 1e-8) if metric else torch.ones_like(flat(v))
    J = torch.stack([flat(r) for r in rest])
    before = flat(gradient)
    c = torch.linalg.solve((J * H) @ J.T, (J * H) @ before)
    weights = surgery.project_span_(gradient, rest, second_moments=v if metric else None)
    assert relative_error(flat(gradient), before - c @ J) < 1e-6
    assert relative_error(weights, torch.cat([torch.ones(1), -c])) < 1e-5
    after = flat(gradient)
    cosines = ((J * H) @ after) / (((J * H) @ J.T).diagonal() * (H * after * after).sum()).sqrt()
    assert cosines.abs().max() < 1e-7
    assert all(torch.equal(flat(a), flat(b)) for a, b in zip(kept, rest, strict=True))


def test_adams_step_along_what_is_left_keeps_the_retain_loss() -> None:
    """To first order: the change of the retain loss is `-lr <r, H g>`."""
    gradient, retain = gradients(2, shapes=SHAPES)
    v = moments()
    surgery.project_span_(gradient, [retain], second_moments=v, eps=1e-3)
    step = flat(gradient) / (flat(v).sqrt() + 1e-3)
    assert abs(float(step @ flat(retain))) < 1e-7 * float(step.norm() * flat(retain).norm())


def test_dependent_and_zero_directions() -> None:
    gradient, r = gradients(2, shapes=SHAPES)
    alone = clones(gradient)
    surgery.project_span_(alone, [r])
    scaled = [1e6 * x for x in r]
    surgery.project_span_(gradient, [r, scaled, [torch.zeros_like(x) for x in r], [2 * x for x in r]])
    assert relative_error(flat(gradient), flat(alone)) < 1e-6


def test_nan_is_not_hidden() -> None:
    gradient, r = gradients(2, shapes=((50,),))
    r[0][3] = torch.nan
    weights = surgery.project_span_(gradient, [r])
    assert weights[1].isnan()
    assert gradient[0].isnan().all()


def test_errors_name_the_argument() -> None:
    x = randn(5)
    with pytest.raises(ValueError, match="sets must hold at least one list"):
        surgery.weighted_gramian([], [])
    with pytest.raises(ValueError, match="directions must hold at least one list"):
        surgery.project_span_([x], [])
    with pytest.raises(ValueError, match=r"sets\[0\]\[0\] and second_moments\[0\] must have one shape"):
        surgery.weighted_gramian([[x]], [randn(6)])
    with pytest.raises(
        ValueError, match=r"sets\[0\] and second_moments must have the same length, got 1 and 2"
    ):
        surgery.weighted_gramian([[x]], [x, x])
    with pytest.raises(ValueError, match=r"steps must be one number or one a tensor, 1, got shape \(2,\)"):
        surgery.weighted_gramian([[x]], [x], steps=[1.0, 2.0])

"""Masks, AdamW, metric and compressed gradients in Triton against the references."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference import surgery_adamw, surgery_compressed, surgery_masks, surgery_metric
from unlearn_kernels.testing import randn, relative_error
from unlearn_kernels.triton_kernels.surgery import adamw, compressed, masks, metric

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MIXED = (torch.bfloat16, torch.float32)
SHAPES = ((33, 7), (1,), (0,), (), (1025,))
# The interpreter cuts float32 off to bfloat16, GPUs round: about twice the error.
SLACK = {torch.bfloat16: 2.5}


def tensors(*dtypes: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [randn(*s, seed=seed + i, dtype=dtypes[i % len(dtypes)]) for i, s in enumerate(SHAPES)]


def flat(xs: list[Tensor]) -> Tensor:
    return torch.cat([x.double().reshape(-1) for x in xs])


@pytest.mark.parametrize(
    ("dtypes", "bits"), [(FLOATS[i : i + 1], i % 2 == 0) for i in range(4)] + [(MIXED, True), (FLOATS, False)]
)
def test_masks(dtypes: tuple[torch.dtype, ...], bits: bool) -> None:
    xs = tensors(*dtypes)
    n = sum(x.numel() for x in xs)
    counts = [0, n // 3, n]
    for ours, plain in zip(
        masks.topk_mask(xs, counts, False, bits),
        surgery_masks.topk_mask(xs, counts, False, bits),
        strict=True,
    ):
        assert torch.equal(ours, plain)


def test_ties_nan_and_each_tensor_for_itself() -> None:
    x = torch.randint(-2, 3, (2000,), generator=torch.Generator().manual_seed(0)).float()
    x[::7], x[5], x[6] = torch.nan, torch.inf, -0.0
    asked = [x[:999], x[999:]], [1, 3, 400, 900, 1700, 1800], False
    for bits in (False, True):
        ours, plain = (m.topk_mask(*asked, bits) for m in (masks, surgery_masks))
        assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    pair, counts = [randn(50, 3).T, randn(40)], [10, 7, 150, 0]
    ours, plain = (m.topk_mask(pair, counts, True, False) for m in (masks, surgery_masks))
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOATS), FLOATS])
def test_apply(dtypes: tuple[torch.dtype, ...], bits: bool) -> None:
    xs = tensors(*dtypes)
    chosen = surgery_masks.topk_mask(xs, [sum(x.numel() for x in xs) // 3], False, bits)
    expected = [x.clone() for x in xs]
    surgery_masks.apply_mask_(expected, chosen)
    masks.apply_mask_(xs, chosen)
    assert all(torch.equal(a, b) for a, b in zip(xs, expected, strict=True))


def test_apply_to_strided_memory() -> None:
    memory, mask = torch.full((30, 20), 7.0), randn(30, 9) > 0
    view = memory[:, 3:12].copy_(randn(30, 9, seed=1))
    masks.apply_mask_([view], [mask])
    assert torch.equal(view, randn(30, 9, seed=1) * mask)
    assert (memory[:, :3] == 7).all()
    assert (memory[:, 12:] == 7).all()


@pytest.mark.parametrize("sets", [1, 2, 5])
@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOATS), MIXED])
def test_weighted_gramian(dtypes: tuple[torch.dtype, ...], sets: int) -> None:
    g = [x for k in range(sets) for x in tensors(*dtypes, seed=10 * k)]
    v = [x.square() for x in tensors(*dtypes[::-1], seed=90)]
    scales = torch.linspace(1, 2, len(SHAPES), dtype=torch.float64)
    found, exact = (m.weighted_gramian(g, sets, v, scales, 1e-2) for m in (metric, surgery_metric))
    size = exact.diagonal().sqrt()
    error = ((found - exact).abs() / torch.outer(size, size)).max()
    assert error < (1e-12 if torch.float64 in dtypes else 1e-6)


def test_weighted_gramian_out_of_range() -> None:
    g, v = [randn(700) * 1e-30, randn(700, seed=1)], [torch.ones(700)]
    scales = torch.ones(1, dtype=torch.float64)
    found, exact = (m.weighted_gramian(g, 2, v, scales, 1e-8) for m in (metric, surgery_metric))
    assert torch.allclose(found, exact, rtol=1e-5, atol=0)


def state(dtype: torch.dtype, moments: torch.dtype) -> list[list[Tensor]]:
    params, first = tensors(dtype), tensors(moments, seed=20)
    second = [x.square() for x in tensors(moments, seed=30)]
    return [params, first, second, [torch.tensor(float(i)) for i in range(len(SHAPES))]]


GROUPS = torch.tensor(
    [[0.01, 0.9, 0.99, 1e-3, 0.1, -1.0], [0.1, 0.0, 0.5, 1e-8, 0.0, 1.0]], dtype=torch.float64
)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("dtype", "moments", "gradient"),
    [*((d, d, d) for d in FLOATS), (torch.bfloat16, torch.float32, torch.bfloat16)],
)
def test_adamw(dtype: torch.dtype, moments: torch.dtype, gradient: torch.dtype, stochastic: bool) -> None:
    gradients = [*tensors(gradient, seed=40), *tensors(gradient, seed=60)]
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64)
    rest = gradients, weights, GROUPS, [0, 1, 0, 1, 1], stochastic, 7
    ours, exact = state(dtype, moments), state(dtype, moments)
    wide = [[x.double() for x in part] for part in exact[:3]] + [exact[3]]
    adamw.surgical_adamw_(*ours, *rest)
    surgery_adamw.surgical_adamw_(*wide, *rest)
    steps = [float(s) for s in ours[3]]
    assert steps == [1.0, 2.0, 3.0, 4.0, 5.0]
    # Random rounding is as wide as a unit in the last place.
    slack = SLACK.get(dtype, 1) * (2 if stochastic else 1)
    for made, wanted, kind in zip(ours, wide, (dtype, moments, moments), strict=False):
        assert relative_error(flat(made), flat(wanted)) < 2 * torch.finfo(kind).eps * slack + 1e-15


def test_adamw_rounds_at_random_as_the_reference_does() -> None:
    x = randn(3000)
    params, moments = [x.bfloat16()], [torch.zeros(3000)]
    groups = torch.tensor([[0.01, 0.0, 0.0, 1e-8, 0.0, 1.0]], dtype=torch.float64)
    gradients, weights = [randn(3000, seed=1)], torch.ones(1, dtype=torch.float64)
    exact = [params[0].float()]
    for target, stochastic in ((params, True), (exact, False)):
        adamw.surgical_adamw_(
            target, [m.clone() for m in moments], [m.clone() for m in moments], [torch.zeros(())], gradients,
            weights, groups, [0], stochastic, 11,
        )  # fmt: skip
    assert torch.equal(params[0], surgery_adamw.stochastically(exact[0], 11, 0, 1))


def test_adamw_skips_what_is_not_finite() -> None:
    parts, before = state(torch.float32, torch.float32), state(torch.float32, torch.float32)
    gradients = [*tensors(torch.float32), *tensors(torch.float32)]
    weights = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    adamw.surgical_adamw_(*parts, gradients, weights, GROUPS, [0] * 5, False, 0)
    assert all(torch.equal(flat(a), flat(b)) for a, b in zip(parts, before, strict=True))


@pytest.mark.parametrize("dtypes", [*((d,) for d in FLOATS), FLOATS])
def test_compress(dtypes: tuple[torch.dtype, ...]) -> None:
    xs = tensors(*dtypes)
    (codes, scales), (plain, plain_scales) = compressed.compress(xs), surgery_compressed.compress(xs)
    assert all(torch.equal(a, b) for a, b in zip(codes, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(scales, plain_scales, strict=True))
    out, expected = ([torch.empty_like(x) for x in xs] for _ in range(2))
    compressed.decompress_(out, codes, scales)
    surgery_compressed.decompress_(expected, codes, scales)
    slack = max(SLACK.get(d, 0) * torch.finfo(d).eps for d in dtypes)
    assert relative_error(flat(out), flat(expected)) <= slack


def test_compress_not_finite() -> None:
    x = randn(700)
    x[300] = torch.inf
    (codes,), (scales,) = compressed.compress([x])
    assert scales.isnan().tolist() == [False, True, False]
    assert (codes[256:512] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_project_conflict_compressed(dtype: torch.dtype) -> None:
    codes, scales = surgery_compressed.compress(tensors(torch.float32))
    forget = [n - 2 * x for n, x in zip(tensors(dtype, seed=50), tensors(dtype), strict=True)]
    copies, retain = [x.clone() for x in forget], [torch.empty_like(c, dtype=torch.float32) for c in codes]
    before = [x.to(torch.float64, copy=True) for x in forget]
    found = compressed.project_conflict_compressed_(forget, codes, scales)
    expected = surgery_compressed.project_conflict_compressed_(copies, codes, scales)
    surgery_compressed.decompress_(retain, codes, scales)
    assert expected[0][0, 1] < 0
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-7
    exact = flat(before) + found[1][1] * flat(retain)
    assert relative_error(flat(forget), exact) < torch.finfo(dtype).eps * SLACK.get(dtype, 1)


def test_no_conflict_writes_nothing() -> None:
    forget = [randn(500)]
    before = forget[0].clone()
    codes, scales = surgery_compressed.compress(forget)
    _, weights = compressed.project_conflict_compressed_(forget, codes, scales)
    assert weights.tolist() == [1.0, 0.0]
    assert torch.equal(forget[0], before)

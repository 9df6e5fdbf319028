import pytest
import torch
from torch import Tensor

from tests.surgery.lists import agem, clones, flat, gradients, layouts
from unlearn_kernels.surgery import CompressedGradient
from unlearn_kernels.testing import at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((37, 129), (1,), (0, 3), (), (256,), (257,), (20_011,))


def decoded(x: Tensor) -> Tensor:
    """By the definition, block by block, in float32."""
    out = [torch.zeros(0)]
    for block in x.float().reshape(-1).split(256):
        scale = block.abs().max() / 127 if len(block) else torch.ones(())
        out.append(torch.round(block / scale) * scale)
    return torch.cat(out).view(x.shape)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_codes_are_those_of_the_definition(dtype: torch.dtype, backend: str) -> None:
    (tensors,) = gradients(1, dtype, shapes=SHAPES)
    kept = CompressedGradient(tensors, backend=backend)
    assert [c.shape for c in kept.codes] == [x.shape for x in tensors]
    assert [len(s) for s in kept.scales] == [(x.numel() + 255) // 256 for x in tensors]
    assert kept.nbytes == sum(x.numel() + 4 * ((x.numel() + 255) // 256) for x in tensors)
    expected = [decoded(x) for x in tensors]
    assert all(int(c.abs().max()) == 127 for c in kept.codes if c.numel())
    for out in FLOATS:
        back = kept.decompress(out, backend=backend)
        assert {x.dtype for x in back} == {out}
        assert all(torch.equal(a, b.to(out)) for a, b in zip(back, expected, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
def test_backends_agree_on_every_bit(dtype: torch.dtype) -> None:
    (tensors,) = gradients(1, dtype, shapes=SHAPES)
    ours, plain = (CompressedGradient(tensors, backend=b) for b in ("cpp", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(ours.codes, plain.codes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours.scales, plain.scales, strict=True))


def test_error_is_within_half_a_scale() -> None:
    x = randn(100_000)
    kept = CompressedGradient([x])
    scales = kept.scales[0].repeat_interleave(256)[: x.numel()]
    assert bool(((kept.decompress()[0] - x).abs() <= 0.5001 * scales).all())
    assert relative_error(kept.decompress()[0], x) < 0.01


def test_blocks_of_zeros_tiny_and_huge_numbers() -> None:
    x = torch.cat(
        [torch.zeros(256), torch.full((256,), 1e-44), randn(256) * 1e38, torch.full((256,), -1e-30)]
    )
    back = CompressedGradient([x]).decompress()[0]
    assert (back[:256] == 0).all()
    assert (back[256:512].abs() <= 1e-44).all()
    assert relative_error(back[512:768], x[512:768]) < 0.01
    assert relative_error(back[768:], x[768:]) < 1e-6


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_comes_back_as_nan(value: float) -> None:
    x = randn(700)
    x[300] = value
    back = CompressedGradient([x]).decompress()[0]
    assert back[256:512].isnan().all()
    assert back[:256].isfinite().all()
    assert back[512:].isfinite().all()
    forget = [randn(700, seed=1)]
    assert CompressedGradient([x]).project_conflict_(forget).weights[1].isnan()
    assert forget[0].isnan().all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_projects_against_what_the_codes_stand_for(dtype: torch.dtype, backend: str) -> None:
    forget, retain = gradients(2, dtype, shapes=SHAPES)
    kept = CompressedGradient(retain)
    r = flat(kept.decompress(torch.float64))
    exact, before = agem(flat(forget), r), flat(forget)
    found = kept.project_conflict_(forget, backend=backend)
    G = torch.stack([before, r])
    assert relative_error(found.gramian, G @ G.T) < 1e-6
    assert found.weights[1] > 0
    assert relative_error(flat(forget), exact) <= 1.05 * relative_error(exact.to(dtype), exact) + 1e-12


def test_writes_nothing_without_conflict() -> None:
    forget, retain = gradients(2, shapes=SHAPES)
    before = clones(forget)
    found = CompressedGradient([-x for x in retain]).project_conflict_(forget)
    assert found.weights.tolist() == [1.0, 0.0]
    assert torch.equal(flat(before), flat(forget))


def test_squares_out_of_range() -> None:
    f, r = randn(1000) * 1e-28, -randn(1000) * 1e-28 + 1e-29 * randn(1000, seed=1)
    kept = CompressedGradient([r])
    wide = torch.stack([f.double(), kept.decompress(torch.float64)[0]])
    assert relative_error(kept.project_conflict_([f]).gramian, wide @ wide.T) < 1e-6


def test_strides() -> None:
    x, f = randn(70, 33), randn(70, 33, seed=1) - randn(70, 33)
    plain = CompressedGradient([x])
    expected = f.clone()
    plain.project_conflict_([expected])
    for view in layouts(x).values():
        assert torch.equal(CompressedGradient([view]).codes[0], plain.codes[0])
    for view in layouts(f).values():
        plain.project_conflict_([view])
        assert torch.equal(view, expected)


def test_same_bits_at_every_number_of_threads() -> None:
    forget, retain = gradients(2, shapes=((300_000,), (100, 999)))

    def run() -> Tensor:
        kept, made = CompressedGradient(retain), clones(forget)
        kept.project_conflict_(made)
        return torch.cat([flat(kept.codes), flat(made)])

    one, two, four = at_threads((1, 2, 4), run)
    assert torch.equal(one, two)
    assert torch.equal(one, four)


def test_empty() -> None:
    kept = CompressedGradient([])
    assert kept.decompress() == []
    assert kept.project_conflict_([]).weights.tolist() == [1.0, 0.0]


def test_errors_name_the_argument() -> None:
    kept = CompressedGradient([randn(5)])
    with pytest.raises(ValueError, match=r"tensors\[1\] must be float32.*got torch.int64"):
        CompressedGradient([randn(5), torch.arange(3)])
    with pytest.raises(ValueError, match="must have the same length, got 2 and 1"):
        kept.project_conflict_([randn(5), randn(5)])
    with pytest.raises(ValueError, match=r"forget\[0\] must have shape \(5,\), got \(6,\)"):
        kept.project_conflict_([randn(6)])
    with pytest.raises(ValueError, match=r"forget\[0\] is written and overlaps in memory with itself"):
        kept.project_conflict_([randn(1).expand(5)])

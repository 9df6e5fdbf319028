import pytest
import torch
from torch import Tensor

from tests.surgery.lists import SHAPES, clones, flat, gradients, layouts
from unlearn_kernels import surgery
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WEIGHTS = (1.0, -0.7, 0.3, 2.5, -1.1, 0.01, 3.3, -0.2, 0.9)


def weighted(sets: list[list[Tensor]], weights: tuple[float, ...] = WEIGHTS) -> Tensor:
    return sum(w * flat(g) for w, g in zip(weights, sets, strict=False))


def assert_rounded_once(actual: list[Tensor], exact: Tensor, dtype: torch.dtype) -> None:
    rounded = exact.to(dtype)
    got = torch.cat([x.reshape(-1) for x in actual])
    assert got.dtype == dtype
    assert relative_error(got, exact) <= 1.01 * relative_error(rounded, exact) + 1e-15


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sets", [1, 2, 3, 4, 5, 9])
def test_matches_float64(sets: int, dtype: torch.dtype) -> None:
    g = gradients(sets, dtype)
    exact = weighted(g)
    assert_rounded_once(surgery.combine(g, WEIGHTS[:sets]), exact, dtype)
    surgery.combine_(g, torch.tensor(WEIGHTS[:sets], dtype=torch.float64))
    assert_rounded_once(g[0], exact, dtype)


@pytest.mark.parametrize(
    "dtypes",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float64)],
)
def test_mixed_dtypes_write_the_dtype_of_the_first_set(dtypes: tuple[torch.dtype, ...]) -> None:
    g = gradients(3, *dtypes)
    exact, others = weighted(g), [clones(s) for s in g[1:]]
    surgery.combine_(g, WEIGHTS[:3])
    assert_rounded_once(g[0], exact, dtypes[0])
    for before, after in zip(others, g[1:], strict=True):
        assert torch.equal(flat(before), flat(after))


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 1023, 1025, 2049, 4111, 16385, 16384 + 2065])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sets", [1, 2, 3, 6])
def test_odd_sizes_touch_nothing_else(n: int, dtype: torch.dtype, sets: int) -> None:
    memory = torch.full((n + 64,), 7.0, dtype=dtype)
    g = [[randn(n, dtype=dtype, seed=k)] for k in range(sets)]
    out = memory[32 : 32 + n].copy_(g[0][0])
    exact = weighted(g)
    surgery.combine_([[out], *g[1:]], WEIGHTS[:sets])
    assert_rounded_once([out], exact, dtype)
    assert (memory[:32] == 7).all()
    assert (memory[32 + n :] == 7).all()


@pytest.mark.parametrize("shape", [(70, 33), (5, 4000), (4000, 5)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = [[randn(*shape, seed=k, dtype=dtype)] for k in range(3)]
    exact = weighted(g)
    for name, out in layouts(g[0][0]).items():
        surgery.combine_([[out], g[1], [layouts(g[2][0])["transposed"]]], WEIGHTS[:3])
        assert_rounded_once([out], exact, dtype)
        assert name


def test_padding_between_rows_is_left_alone() -> None:
    memory = torch.full((40, 50), 7.0)
    surgery.combine_([[memory[:, 3:33]], [randn(40, 30)]], (0.5, 1.0))
    assert (memory[:, :3] == 7).all()
    assert (memory[:, 33:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_halves_is_torchs(dtype: torch.dtype) -> None:
    x = torch.cat(
        [
            torch.logspace(-9, 5.5, 20_000),
            torch.tensor([0.0, 65504.0, 65519.99, 65520.0, 3.4e38, 2.0**-24, 2.0**-25]),
        ]
    )
    x = torch.cat([x, -x])
    for shape in ((-1,), (2, -1)):  # whole vectors, and gathered from memory of another order
        out = torch.zeros_like(x, dtype=dtype).view(shape)
        source = x.view(shape) if len(shape) == 1 else x.view(shape).T.contiguous().T
        surgery.combine_([[out], [source]], (0.0, 1.0))
        assert torch.equal(out, x.view(shape).to(dtype))


def test_nan_among_bfloat16_stays_nan_and_alone() -> None:
    """Whole vectors are rounded as if they held numbers, unless they do not."""
    bits = torch.tensor([0x7F81, -0x7F, 0x7FFF, -1, 0x7FC0, 0x7F80, -0x80, 0x7F7F], dtype=torch.int16)
    x = randn(5000, dtype=torch.bfloat16)
    places = torch.arange(0, 5000, 97)
    x[places] = bits.view(torch.bfloat16).repeat(8)[: len(places)]
    out = torch.zeros_like(x)
    surgery.combine_([[out], [x]], (0.0, 2.0))
    torch.testing.assert_close(out, 2 * x, rtol=0, atol=0, equal_nan=True)
    assert out.isnan().sum() > 25


def test_same_tensor_in_both_sets() -> None:
    x, y = randn(3000), randn(3000, seed=1)
    exact = 3 * x
    surgery.combine_([[x, y], [x, y.clone()]], (1.0, 2.0))
    assert_as_exact_as("aliased", x, exact.double(), exact)


def test_overlap_is_refused_and_nothing_is_written() -> None:
    memory = randn(100)
    before = memory.clone()
    x, shifted, other = memory[:50], memory[10:60], memory[50:]
    cases = [
        (r"sets\[0\]\[0\] is written and overlaps in memory with sets\[1\]\[0\]", [[x], [shifted]]),
        (
            r"sets\[0\]\[0\] is written and overlaps in memory with sets\[1\]\[1\]",
            [[x, other], [randn(50), x]],
        ),
        ("itself or another tensor of that list", [[x, x], [randn(50), randn(50)]]),
        ("itself or another tensor of that list", [[x, shifted], [randn(50), randn(50)]]),
        ("itself or another tensor of that list", [[memory[:1].expand(50)], [randn(50)]]),
        ("itself or another tensor of that list", [[memory.as_strided((5, 5), (2, 3))], [randn(5, 5)]]),
    ]
    for message, sets in cases:
        with pytest.raises(ValueError, match=message):
            surgery.combine_(sets, (1.0, 1.0))
    assert torch.equal(memory, before)


def test_interleaved_tensors_are_not_an_overlap() -> None:
    fused, rest = randn(64, 96), [randn(64, 32, seed=k) for k in range(3)]
    parts = list(fused.split(32, dim=1))
    exact = flat(parts) + 2 * flat(rest)
    surgery.combine_([parts, rest], (1.0, 2.0))
    assert relative_error(flat(parts), exact) < 1e-7
    memory = randn(1000)
    even, odd = memory[::2], memory[1::2]
    exact = even.double() - odd.double()
    surgery.combine_([[even], [odd]], (1.0, -1.0))
    assert relative_error(even, exact) < 1e-7


def test_new_tensors_are_like_the_first_set() -> None:
    g = gradients(2, torch.bfloat16)
    g[0][0] = g[0][0].T.contiguous().T
    before = flat(g[0])
    out = surgery.combine(g, (1.0, 1.0))
    assert torch.equal(flat(g[0]), before)
    assert [(x.shape, x.dtype, x.stride()) for x in out] == [(x.shape, x.dtype, x.stride()) for x in g[0]]


def test_new_tensors_of_expanded_ones() -> None:
    x = randn(1, 30).expand(40, 30)
    out = surgery.combine([[x], [randn(40, 30)]], (1.0, 0.5))
    assert relative_error(out[0], x.double() + 0.5 * randn(40, 30).double()) < 1e-7


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_at_every_number_of_threads(dtype: torch.dtype) -> None:
    g = gradients(3, dtype, shapes=(*SHAPES, (300_000,)))
    one, two, four = at_threads(
        (1, 2, 4), lambda: torch.cat([x.view(-1) for x in surgery.combine(g, WEIGHTS[:3])])
    )
    assert torch.equal(one, two)
    assert torch.equal(one, four)


def test_non_finite_passes() -> None:
    g = gradients(2, shapes=((100,),))
    g[1][0][[3, 50, 99]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    for weights in ((1.0, 2.0), (1.0, 0.0), (1.0, float("nan"))):
        expected = weights[0] * g[0][0] + weights[1] * g[1][0]
        torch.testing.assert_close(surgery.combine(g, weights)[0], expected, equal_nan=True)


def test_version_counters_tell_autograd() -> None:
    g = [[randn(5)], [randn(5, seed=1)]]
    version = g[0][0]._version
    surgery.combine_(g, (1.0, 1.0))
    assert g[0][0]._version > version
    assert g[1][0]._version == 0


def test_empty() -> None:
    surgery.combine_([[], []], (1.0, 2.0))
    assert surgery.combine([[], []], (1.0, 2.0)) == []
    assert surgery.combine([[torch.empty(0, 3)]], (2.0,))[0].shape == (0, 3)


def test_errors_name_the_argument() -> None:
    x = randn(3)
    with pytest.raises(ValueError, match=r"weights must have one entry a set, shape \(2,\), got \(3,\)"):
        surgery.combine_([[x], [x.clone()]], (1.0, 2.0, 3.0))
    with pytest.raises(ValueError, match=r"sets\[0\]\[0\] and sets\[1\]\[0\] must have one shape"):
        surgery.combine([[x], [randn(4)]], (1.0, 2.0))
    with pytest.raises(ValueError, match="sets must hold at least one list of tensors, got none"):
        surgery.combine_([], ())

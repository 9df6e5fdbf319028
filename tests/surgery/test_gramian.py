import pytest
import torch
from torch import Tensor

from tests.surgery.lists import SHAPES, exact_gramian, gradients, layouts
from unlearn_kernels import surgery
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.testing import at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PROMISED = 1e-6


def entry_error(actual: Tensor, exact: Tensor) -> float:
    """The largest error of an entry, relative to the norms of its two gradients."""
    scale = exact.diagonal().sqrt()
    return float(((actual - exact) / (scale[:, None] * scale)).abs().max())


@pytest.mark.parametrize("sets", range(1, 11))
def test_reference_is_the_definition(sets: int) -> None:
    g = gradients(sets, torch.float64, shapes=((5, 3), (), (7,)))
    assert relative_error(reference.gramian([x for s in g for x in s], sets), exact_gramian(g)) < 1e-14


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sets", [1, 2, 3, 4, 5, 8, 9, 13])
def test_matches_float64(sets: int, dtype: torch.dtype) -> None:
    g = gradients(sets, dtype)
    allowed = 1e-13 if dtype == torch.float64 else PROMISED
    assert entry_error(surgery.gramian(g), exact_gramian(g)) < allowed


@pytest.mark.parametrize("sets", [2, 3, 5])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), FLOATS])
def test_mixed_dtypes(sets: int, dtypes: tuple[torch.dtype, ...]) -> None:
    g = gradients(sets, *dtypes)
    assert entry_error(surgery.gramian(g), exact_gramian(g)) < PROMISED


def test_dtypes_mixed_within_a_set() -> None:
    g = gradients(2)
    g[0][2], g[1][3], g[1][5] = g[0][2].double(), g[1][3].bfloat16(), g[1][5].half()
    assert entry_error(surgery.gramian(g), exact_gramian(g)) < PROMISED


@pytest.mark.parametrize("n", [0, 1, 7, 8, 31, 32, 33, 1023, 1024, 1025, 16383, 16384, 16385, 50021])
@pytest.mark.parametrize("dtype", FLOATS)
def test_odd_sizes(n: int, dtype: torch.dtype) -> None:
    g = [[randn(n, dtype=dtype, seed=k)] for k in range(3)]
    exact = exact_gramian(g)
    if n == 0:
        assert torch.equal(surgery.gramian(g), torch.zeros(3, 3, dtype=torch.float64))
    else:
        assert entry_error(surgery.gramian(g), exact) < PROMISED


@pytest.mark.parametrize("n", [2047, 2048, 4095, 4097, 14_000, 16384 + 2047, 16384 + 2049, 16384 + 4096 + 5])
@pytest.mark.parametrize("sets", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_element_counts_once(n: int, sets: int, dtype: torch.dtype) -> None:
    """Blocks are read in several ranges side by side, whose ends meet at none of these sizes."""
    g = [[(torch.arange(n) % 7 == k).to(dtype)] for k in range(sets)]
    count = torch.tensor([float(x[0].double().sum()) for x in g], dtype=torch.float64)
    assert torch.equal(surgery.gramian(g), torch.diag(count))


@pytest.mark.parametrize("shape", [(70, 33), (5, 4000), (4000, 5), (1, 9), (129, 257)])
@pytest.mark.parametrize("sets", [2, 5])
def test_strides(shape: tuple[int, int], sets: int) -> None:
    g = [[randn(*shape, seed=k)] for k in range(sets)]
    exact = exact_gramian(g)
    for name, other in layouts(g[0][0]).items():
        assert entry_error(surgery.gramian([[other], *g[1:]]), exact) < PROMISED, name
        assert entry_error(surgery.gramian([[layouts(x[0])[name]] for x in g]), exact) < PROMISED, name


def test_convolution_weights_in_two_memory_formats() -> None:
    x, y = randn(6, 5, 3, 3), randn(6, 5, 3, 3, seed=1)
    g = [[x.to(memory_format=torch.channels_last)], [y]]
    assert entry_error(surgery.gramian(g), exact_gramian(g)) < PROMISED


def test_expanded_and_permuted() -> None:
    x, y = randn(7, 1, 11).expand(7, 50, 11), randn(50, 11, 7, seed=1).permute(2, 0, 1)
    g = [[x, randn().expand(3000)], [y, randn(3000, seed=2)]]
    assert entry_error(surgery.gramian(g), exact_gramian(g)) < PROMISED


def test_symmetric_and_permutable() -> None:
    g = gradients(5)
    G = surgery.gramian(g)
    assert torch.equal(G, G.T)
    order = [3, 1, 4, 0, 2]
    permuted = surgery.gramian([g[i] for i in order])
    assert relative_error(permuted, G[order][:, order]) < PROMISED


@pytest.mark.parametrize("dtype", FLOATS)
def test_same_bits_at_every_number_of_threads(dtype: torch.dtype) -> None:
    g = gradients(3, dtype, shapes=(*SHAPES, (300_000,), (400, 700)))
    g[1][-1] = g[1][-1].T.contiguous().T
    one, two, four = at_threads((1, 2, 4), lambda: surgery.gramian(g))
    assert torch.equal(one, two)
    assert torch.equal(one, four)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-12, 1e25, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squares_stay_in_range(scale: float, dtype: torch.dtype) -> None:
    g = [
        [(x.double() * scale).to(dtype) for x in s]
        for s in gradients(2, torch.float64, shapes=((3000,), (50, 40)))
    ]
    G = surgery.gramian(g)
    assert G.isfinite().all()
    assert entry_error(G, exact_gramian(g)) < PROMISED


def test_tiny_beside_zero_and_large() -> None:
    g = gradients(3, shapes=((40_000,),))
    g[0][0].mul_(1e-30)[:20_000] = 0
    g[1][0].mul_(1e30)[5000:] = 0
    assert entry_error(surgery.gramian(g), exact_gramian(g)) < PROMISED


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("place", [0, 40, -1])
def test_non_finite_passes(value: float, dtype: torch.dtype, place: int) -> None:
    g = gradients(3, dtype, shapes=((1003,), (5,)))
    g[1][0][place] = value
    expected = reference.gramian([x for s in g for x in s], 3)
    actual = surgery.gramian(g)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isinf(), expected.isinf())
    assert torch.equal(actual[actual.isinf()], expected[expected.isinf()])
    assert actual[0, 2].isfinite()


def test_empty_lists_and_tensors() -> None:
    assert torch.equal(surgery.gramian([[], []]), torch.zeros(2, 2, dtype=torch.float64))
    g = gradients(2, shapes=((0,), (3, 0, 2), (4,)))
    assert relative_error(surgery.gramian(g), exact_gramian(g)) < PROMISED


def test_gradients_that_require_grad() -> None:
    x = randn(5).requires_grad_()
    assert not surgery.gramian([[x], [x]]).requires_grad


def test_errors_name_the_argument() -> None:
    x = randn(3)
    cases = [
        ("sets must hold at least one", []),
        (r"sets\[0\] and sets\[1\] must have the same length, got 1 and 2", [[x], [x, x]]),
        (
            r"sets\[0\]\[1\] and sets\[2\]\[1\] must have one shape, got \(3,\) and \(4,\)",
            [[x, x], [x, x], [x, randn(4)]],
        ),
        (
            r"sets\[1\]\[0\] must be float32, float64, bfloat16 or float16, got torch.int64",
            [[x], [torch.ones(3).long()]],
        ),
        (r"sets\[0\]\[1\] must be float32, .* got torch.bool", [[x, x > 0], [x, x]]),
        (r"sets\[1\]\[0\] must be on cpu like the first tensor, got meta", [[x], [x.to("meta")]]),
        (r"sets\[0\] and sets\[1\] must have the same length, got 0 and 2", [[], [x, x]]),
    ]
    for message, sets in cases:
        with pytest.raises(ValueError, match=message):
            surgery.gramian(sets)
    with pytest.raises(
        ValueError, match="scope must be 'global' or 'group' or 'tensor' or 'row', got 'layer'"
    ):
        surgery.gramian([[x]], scope="layer")


@pytest.mark.slow
def test_a_hundred_million_elements() -> None:
    n = 120_000_000
    base = randn(1 << 20)
    x = base.repeat(-(-n // base.numel()))[:n]
    y = x.roll(12_345).mul_(0.9).sub_(x, alpha=0.3)
    exact = torch.zeros(2, 2, dtype=torch.float64)
    for a, b in zip(x.split(1 << 22), y.split(1 << 22), strict=True):
        pair = torch.stack([a.double(), b.double()])
        exact += pair @ pair.T
    error = ((surgery.gramian([[x], [y]]) - exact) / exact).abs().max()
    assert error < PROMISED


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 5000
    x = randn(1).expand(n)
    G = surgery.gramian([[x]])
    assert relative_error(G, x[0].double().square() * n * torch.ones(1, 1)) < PROMISED

"""The matrix-free Rademacher projection against its definition."""

import math

import pytest
import torch

from unlearn_kernels import influence
from unlearn_kernels._backends import BackendError
from unlearn_kernels.influence import Projection
from unlearn_kernels.reference.influence import philox4x32, rademacher_signs
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn, relative_error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dense(p: Projection, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """The matrix `P / sqrt(k)` that `p` never forms."""
    return p.signs(torch.arange(p.k), torch.arange(p.dim)).to(dtype) / math.sqrt(p.k)


@pytest.mark.parametrize(
    ("word", "seed", "expected"),
    [
        (0, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (1 << 64) - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_known_answers(word: int, seed: int, expected: tuple[int, ...]) -> None:
    """The vectors published with Random123."""
    counter = torch.tensor([word])
    assert tuple(int(w) for w in philox4x32((counter,) * 4, seed)) == expected


def test_sign_layout() -> None:
    """Bit b of word w of the call (row, block) is coordinate 128 block + 32 w + b."""
    seed, row, block = 0x1234_5678_9ABC, 5, 3
    words = philox4x32(tuple(torch.tensor([x]) for x in (row, block, 0, 0)), seed)
    expected = [1 if int(words[w]) >> b & 1 else -1 for w in range(4) for b in range(32)]
    cols = torch.arange(128 * block, 128 * block + 128)
    assert rademacher_signs(torch.tensor([row]), cols, seed)[0].tolist() == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 3, 8, 9, 16, 31, 33, 70])
@pytest.mark.parametrize(("dim", "k"), [(1, 1), (127, 7), (129, 8), (640, 130), (4500, 65)])
def test_against_the_matrix(batch: int, dim: int, k: int, dtype: torch.dtype) -> None:
    p = Projection(dim, k, seed=0x0123_4567_89AB_CDEF)
    g = randn(batch, dim, dtype=dtype)
    y = p(g)
    assert y.shape == (batch, k)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = g.double() @ dense(p).T
    eager = g.to(y.dtype) @ dense(p, y.dtype).T
    # The yardstick of a float64 result is itself rounded: a random walk of dim steps.
    floor = max(4.0, math.sqrt(dim)) * torch.finfo(dtype).eps if dtype == torch.float64 else None
    assert_as_exact_as("y", y, exact, eager, floor=floor)


def test_reference_is_the_formula() -> None:
    p = Projection(700, 33, seed=4)
    g = randn(5, 700, dtype=torch.float64)
    assert relative_error(p.project(g, backend="reference"), g @ dense(p).T) < 1e-14


def test_long_sums_stay_exact() -> None:
    """A million coordinates with a mean far from zero: the float sums are short, the rest is in double."""
    dim = 1 << 20
    p = Projection(dim, 4, seed=1)
    g = randn(2, dim) + 100
    assert relative_error(p(g), p.project(g.double())) < 1e-6


def test_corners_of_one_matrix() -> None:
    p = Projection(1000, 40, seed=9)
    signs = p.signs(torch.arange(40), torch.arange(1000))
    fewer_rows = Projection(1000, 10, seed=9)
    fewer_cols = Projection(300, 40, seed=9)
    assert torch.equal(fewer_rows.signs(torch.arange(10), torch.arange(1000)), signs[:10])
    assert torch.equal(fewer_cols.signs(torch.arange(40), torch.arange(300)), signs[:, :300])
    g = randn(3, 1000)
    # The scale 1/sqrt(k) differs by an exact factor of 2.
    assert torch.equal(fewer_rows(g), p(g)[:, :10] * 2)
    short = torch.cat([g[:, :300], torch.zeros(3, 700)], dim=1)
    assert torch.equal(fewer_cols(g[:, :300]), p(short))


def test_seeds_give_unrelated_signs() -> None:
    rows, cols = torch.arange(64), torch.arange(4096)
    first, second, high = (Projection(4096, 64, seed=s).signs(rows, cols).double() for s in (0, 1, 1 << 32))
    for other in (second, high):
        assert abs((first * other).mean().item()) < 5 / math.sqrt(first.numel())


def test_signs_are_fair_and_uncorrelated() -> None:
    """`P^T P / k` is the identity up to sampling noise: mean 0, and k rows average to 1/sqrt(k)."""
    p = Projection(256, 4096, seed=3)
    gram = dense(p).T @ dense(p)
    off = gram - torch.eye(256, dtype=torch.float64)
    assert off.diagonal().abs().max() < 1e-12
    assert abs(off.std().item() * math.sqrt(p.k) - 1) < 0.05
    assert off.abs().max().item() * math.sqrt(p.k) < 6


def test_inner_products_are_kept() -> None:
    p = Projection(5000, 4096)
    g = torch.nn.functional.normalize(randn(12, 5000), dim=1)
    error = p(g) @ p(g).T - g @ g.T
    assert error.abs().max().item() * math.sqrt(p.k) < 6


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_has_the_same_bits_in_every_batch(dtype: torch.dtype) -> None:
    p = Projection(3000, 70)
    g = randn(70, 3000, dtype=dtype)
    whole = p(g)
    for part in (slice(0, 1), slice(3, 10), slice(5, 38), slice(20, 70)):
        assert torch.equal(p(g[part]), whole[part])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch", "k"), [(3, 700), (70, 130)])
def test_thread_count_does_not_matter(batch: int, k: int, dtype: torch.dtype) -> None:
    p, g = Projection(2500, k), randn(batch, 2500, dtype=dtype)
    one, two, four = at_threads((1, 2, 4), lambda: p(g))
    assert torch.equal(one, two)
    assert torch.equal(one, four)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    p, g = Projection(301, 20), randn(19, 301, dtype=dtype)
    expected = p(g)
    padded = torch.zeros(19, 2 * 301, dtype=dtype)
    padded[:, ::2] = g
    assert torch.equal(p(padded[:, ::2]), expected)
    assert torch.equal(p(g.T.contiguous().T), expected)
    assert torch.equal(p(g[:1].expand(19, 301)), expected[:1].expand(19, 20))
    assert torch.equal(p(g[:, :1].expand(19, 301)), p(g[:, :1].repeat(1, 301)))


def test_leading_dimensions() -> None:
    p, g = Projection(50, 6), randn(2, 3, 50)
    assert torch.equal(p(g), p(g.reshape(6, 50)).reshape(2, 3, 6))
    assert torch.equal(p(g[0, 0]), p(g)[0, 0])


def test_empty_batch() -> None:
    assert Projection(50, 6)(torch.zeros(0, 50)).shape == (0, 6)
    assert Projection(50, 6)(torch.zeros(2, 0, 50)).shape == (2, 0, 6)


def test_nan_and_inf_stay_in_their_sample() -> None:
    p, g = Projection(500, 24), randn(3, 500)
    clean = p(g)
    g[0, 77], g[2, 130] = math.nan, -math.inf
    y = p(g)
    assert y[0].isnan().all()
    assert torch.equal(y[1], clean[1])
    sign = p.signs(torch.arange(24), torch.tensor([130]))[:, 0]
    assert torch.equal(y[2], -math.inf * sign.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_overflow_through_half_precision(dtype: torch.dtype) -> None:
    p, g = Projection(400, 16), torch.full((2, 400), 1e5, dtype=dtype)
    assert relative_error(p(g), p.project(g.double())) < 1e-6


def test_large_fp16_entries() -> None:
    p, g = Projection(4000, 16), torch.full((2, 4000), 65504.0, dtype=torch.float16)
    assert relative_error(p(g), p.project(g.double())) < 1e-6


def test_offsets_beyond_2_to_the_31() -> None:
    """Rows so far apart that their offsets need 64 bits; only the pages that are read come into being."""
    storage = torch.empty((1 << 31) + 4096, dtype=torch.bfloat16)
    rows = storage.as_strided((2, 300), ((1 << 31) + 1000, 1))
    rows.copy_(randn(2, 300, dtype=torch.bfloat16))
    p = Projection(300, 9)
    assert torch.equal(p(rows), p(rows.clone()))


def test_vmap() -> None:
    p, g = Projection(130, 12), randn(4, 5, 130)
    assert torch.equal(torch.vmap(p)(g), p(g))
    assert torch.equal(torch.vmap(p, in_dims=1)(g), p(g.transpose(0, 1)))


def test_compile() -> None:
    p, g = Projection(130, 12), randn(5, 130)
    assert torch.equal(torch.compile(lambda x: p(x) * 2, fullgraph=True, backend="aot_eager")(g), p(g) * 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    op = torch.ops.unlearn_kernels.rademacher_project.default
    torch.library.opcheck(op, (randn(3, 70, dtype=dtype), 10, 7))
    torch.library.opcheck(op, (randn(70, 3, dtype=dtype).T, 10, 7))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dim": 0, "k": 1}, "dim"),
        ({"dim": (1 << 39) + 1, "k": 1}, "dim"),
        ({"dim": 4, "k": 0}, "k"),
        ({"dim": 4, "k": (1 << 32) + 1}, "k"),
        ({"dim": 4, "k": 1, "seed": -1}, "seed"),
        ({"dim": 4, "k": 1, "seed": 1 << 63}, "seed"),
        ({"dim": 4, "k": 1, "kind": "gauss"}, "kind"),
    ],
)
def test_constructor_errors(arguments: dict, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Projection(**arguments)


def test_project_errors() -> None:
    p = Projection(5, 3)
    for bad in (torch.zeros(2, 4), torch.tensor(1.0), torch.zeros(2, 5, dtype=torch.int64)):
        with pytest.raises(ValueError, match="g must"):
            p(bad)
    with pytest.raises(ValueError, match="require grad"):
        p(torch.zeros(2, 5, requires_grad=True))
    with torch.no_grad():
        assert p(torch.zeros(2, 5, requires_grad=True)).shape == (2, 3)


def test_signs_errors() -> None:
    p = Projection(5, 3)
    with pytest.raises(ValueError, match="rows"):
        p.signs(torch.tensor([3]), torch.tensor([0]))
    with pytest.raises(ValueError, match="cols"):
        p.signs(torch.tensor([0]), torch.tensor([[0]]))
    assert p.signs(torch.tensor([], dtype=torch.int64), torch.tensor([1])).shape == (0, 1)


def test_backends() -> None:
    p, g = Projection(64, 4), randn(2, 64)
    assert relative_error(p.project(g, backend="cpp"), p.project(g.double(), backend="reference")) < 1e-6
    with pytest.raises(BackendError, match="rademacher_project: backend 'triton'"):
        p.project(g, backend="triton")
    with pytest.raises(ValueError, match="backend"):
        p.project(g, backend="numpy")


def test_repr_and_exports() -> None:
    assert repr(influence.Projection(8, 2, seed=5)) == "Projection(dim=8, k=2, kind='rademacher', seed=5)"

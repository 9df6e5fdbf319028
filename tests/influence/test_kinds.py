"""Every kind of projection against the matrix that it stands for."""

import math
from collections.abc import Callable

import pytest
import torch

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import linear
from unlearn_kernels.reference import sketches
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn, relative_error

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEED = 0x0123_4567_89AB_CDEF


def make(kind: str, dim: int = 5 * 1237, k: int = 64, seed: int = SEED) -> Projection:
    more = {
        "gaussian": {},
        "sjlt": {"terms": 3},
        "srht": {},
        "two_sided": {"shape": (5, dim // 5), "sides": (4, k // 4)},
        "tensorsketch": {"shape": (5, dim // 5)},
        "rademacher": {},
    }
    return Projection(dim, k, kind, seed, **more[kind])


KINDS = pytest.mark.parametrize(
    "kind", ["rademacher", "gaussian", "sjlt", "srht", "two_sided", "tensorsketch"]
)


def dense(p: Projection) -> torch.Tensor:
    """`P` (k, dim) by the reference's projection of the identity; of `srht` by its definition."""
    if p.kind == "srht":
        rows, cols = sketches.hadamard_rows(p.k, (p.dim - 1).bit_length(), p.seed), torch.arange(p.dim)
        ones = torch.tensor([[(int(r) & c).bit_count() % 2 for c in range(p.dim)] for r in rows])
        return (1 - 2 * ones).double() * sketches.diagonal_signs(cols, p.seed) / math.sqrt(p.k)
    parts = []
    for begin in range(0, p.dim, 2000):
        size = min(2000, p.dim - begin)
        part = torch.zeros(size, p.dim, dtype=torch.float64)
        part[torch.arange(size), begin + torch.arange(size)] = 1
        parts.append(p.project(part, backend="reference" if p.kind != "two_sided" else None))
    return torch.cat(parts).T


_dense: dict[str, torch.Tensor] = {}


def matrix(kind: str) -> torch.Tensor:
    if kind not in _dense:
        _dense[kind] = dense(make(kind))
    return _dense[kind]


@KINDS
@pytest.mark.parametrize("dtype", DTYPES)
def test_is_linear_map_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    p, g = make(kind), randn(19, 5 * 1237, dtype=dtype)
    y = p(g)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    P = matrix(kind)
    floor = math.sqrt(p.dim) * torch.finfo(dtype).eps if dtype == torch.float64 else None
    assert_as_exact_as("y", y, g.double() @ P.T, g.to(y.dtype) @ P.T.to(y.dtype), floor=floor)


@KINDS
def test_adjoint_is_the_transpose(kind: str) -> None:
    p, y = make(kind), randn(3, 64, dtype=torch.float64)
    P = matrix(kind)
    assert relative_error(p.adjoint(y), y @ P) < 1e-12
    for offset, size in ((0, 7), (129, 4000), (4099, 100), (p.dim - 1, 1), (50, 0)):
        part = p.adjoint(y, offset=offset, size=size)
        assert relative_error(part, (y @ P)[:, offset : offset + size]) < 1e-12
    assert relative_error(p.adjoint(y.float()), y @ P) < 1e-6
    assert p.adjoint(y[0].float()).shape == (p.dim,)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_sum_to_the_whole(kind: str, dtype: torch.dtype) -> None:
    p, g = make(kind), randn(4, 5 * 1237, dtype=dtype)
    running = p.running()
    for begin, end in ((0, 1), (1, 130), (130, 130), (130, 4200), (4200, 4201), (4201, p.dim)):
        running.add(g[:, begin:end])
    assert relative_error(running.result(), p(g)) < 8 * torch.finfo(dtype).eps
    single = p.running()
    single.add(g[0, :100])
    with pytest.raises(ValueError, match="parts must make up 6185 coordinates, got 100"):
        single.result()
    with pytest.raises(ValueError, match="g must have 1 rows as the parts before, got 2"):
        single.add(g[:2, 100:200])


@KINDS
def test_inner_products_are_kept(kind: str) -> None:
    """Unbiased, with a variance of about |g|^2 |h|^2 / k, over seeds."""
    g = torch.nn.functional.normalize(randn(2, 5 * 1237, dtype=torch.float64), dim=1)
    pairs = []
    for seed in range(60):
        y = make(kind, seed=seed)(g)
        pairs.append(y @ y.T - g @ g.T)
    error = torch.stack(pairs)
    deviation = 1 / math.sqrt(64)
    assert error.mean(0).abs().max() < 5 * math.sqrt(2) * deviation / math.sqrt(60)
    bound = 2.5 if kind == "two_sided" else 1.5
    assert error[:, 0, 1].std() < bound * deviation
    assert error[:, 0, 0].std() < bound * math.sqrt(2) * deviation


@KINDS
def test_same_bits_in_every_batch_and_at_every_thread_count(kind: str) -> None:
    if kind == "two_sided":
        pytest.skip("torch's products")
    p, g = make(kind, k=256), randn(37, 5 * 1237)
    one, two, four = at_threads((1, 2, 4), lambda: p(g))
    assert torch.equal(one, two)
    assert torch.equal(one, four)
    assert torch.equal(p(g[5:8]), one[5:8])
    wide = torch.zeros(37, 2 * p.dim)
    wide[:, ::2] = g
    assert torch.equal(p(wide[:, ::2]), one)
    assert torch.equal(p(g.T.contiguous().T), one)


@KINDS
def test_nan_stays_in_its_sample(kind: str) -> None:
    p, g = make(kind), randn(3, 5 * 1237)
    clean = p(g)
    g[1, 4567] = math.nan
    y = p(g)
    assert y[1].isnan().any()
    assert relative_error(y[[0, 2]], clean[[0, 2]]) < 1e-6
    assert p(g[:0]).shape == (0, 64)


def test_normal_samples_have_the_same_bits_in_every_tile() -> None:
    """Register tiles of both heights, batches above one tile's samples, and a last strip that is not whole."""
    p, g = Projection(600, 41, "gaussian", SEED), randn(203, 600)
    y = p(g)
    assert relative_error(y, p(g.double())) < 1e-6
    for rows in range(1, 15):
        assert torch.equal(p(g[:rows]), y[:rows])
    assert torch.equal(p(g[190:]), y[190:])
    assert p(torch.full((3, 600), 1e36)).isfinite().all()


def test_normal_entries_have_the_same_bits() -> None:
    """The projection of a unit vector is a column of P: no addition is left that could differ."""
    p = Projection(300, 64, "gaussian", SEED)
    entries = sketches.normal_entries(torch.arange(64), torch.arange(300), SEED)
    assert torch.equal(p(torch.eye(300)).T * 8, entries)
    assert torch.equal(p.adjoint(torch.eye(64)) * 8, entries)
    far = sketches.normal_entries(torch.arange(64), torch.arange(300) + (1 << 37), SEED)
    wide = Projection(1 << 38, 64, "gaussian", SEED)
    assert torch.equal(wide.project_part(torch.eye(300), 1 << 37).T * 8, far)
    assert not torch.equal(far, entries)


def test_every_normal_number() -> None:
    """All 2^16 of them against the distribution: symmetric, its moments, distribution function and tails."""
    x = sketches.normal_of(torch.arange(1 << 16)).double()
    assert torch.equal((x * 4096).round(), x * 4096)
    assert x.sort().values.equal(-x.sort(descending=True).values)
    assert abs((x**2).mean() - 1) < 1e-6
    assert abs((x**4).mean() - 3) < 2e-3
    assert abs((x**6).mean() - 15) < 0.15
    steps = torch.arange(1 + (1 << 16)).double() / (1 << 16)
    below = torch.special.ndtr(x.sort().values)
    assert torch.maximum((below - steps[:-1]).abs(), (below - steps[1:]).abs()).max() < 6.5e-4
    for bound, share in ((2, 0.01), (3, 0.02), (3.5, 0.05)):
        expected = 2 * torch.special.ndtr(torch.tensor(-float(bound), dtype=torch.float64)) * (1 << 16)
        assert abs((x.abs() > bound).sum() - expected) < share * expected
    assert (x.abs() > 4).sum() == 2
    assert 4.2 < x.max() < 4.4


def test_normal_sample_is_normal() -> None:
    """Kolmogorov-Smirnov over a million entries, and no correlation between neighbours."""
    x = sketches.normal_entries(torch.arange(1024), torch.arange(1024), 5).double()
    flat = x.flatten().sort().values
    steps = (torch.arange(flat.numel()).double() + 0.5) / flat.numel()
    assert (torch.special.ndtr(flat) - steps).abs().max() * math.sqrt(flat.numel()) < 1.63
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[:, 8:], x[:, :-8])):
        assert (a * b).mean().abs() * math.sqrt(a.numel()) < 4


def test_sjlt_columns() -> None:
    """A coordinate goes to `terms` different outputs, one in each share, also where shares differ in size."""
    for k, terms in ((10, 1), (10, 3), (7, 7), (64, 20)):
        p = Projection(400, k, "sjlt", 3, terms=terms)
        P = p(torch.eye(400, dtype=torch.float64)).T
        for term in range(terms):
            share = P[term * k // terms : (term + 1) * k // terms]
            assert torch.equal(share.count_nonzero(0), torch.ones(400, dtype=torch.int64))
        assert (
            relative_error(P.abs().max(0).values, torch.full((400,), terms**-0.5, dtype=torch.float64))
            < 1e-12
        )
    counts = Projection(100_000, 16, "sjlt", 1)(torch.ones(1, 100_000))
    assert counts.abs().max() < 5 * math.sqrt(100_000 / 16)


def test_srht_rows_are_different_and_orthogonal() -> None:
    p = Projection(256, 256, "srht", 11)
    P = p(torch.eye(256, dtype=torch.float64)).T
    assert relative_error(P @ P.T, torch.eye(256)) < 1e-12
    for bits in (1, 5, 13, 31):
        rows = sketches.hadamard_rows(min(1 << bits, 5000), bits, 4)
        assert len(rows.unique()) == len(rows)
        assert 0 <= rows.min() <= rows.max() < 1 << bits
    with pytest.raises(ValueError, match="k must be at most 256"):
        Projection(256, 257, "srht")


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor_sketch_of_a_sample_is_its_own(tokens: int, dtype: torch.dtype) -> None:
    """Whether lanes hold tokens or samples: the bits of a sample alone, and what is not finite stays in it."""
    op = torch.ops.unlearn_kernels.tensor_sketch
    a, g = randn(19, tokens, 5, dtype=dtype), randn(19, tokens, 9, dtype=dtype, seed=1)
    whole = op(a, g, True, 512, 3)
    for b in (0, 7, 18):
        assert torch.equal(op(a[b : b + 1], g[b : b + 1], True, 512, 3)[0], whole[b])
    strided = a.transpose(0, 1).contiguous().transpose(0, 1), g.mT.contiguous().mT
    assert torch.equal(op(*strided, True, 512, 3), whole)
    exact = sketches.tensor_sketch(a.double(), g.double(), True, 512, 3)
    assert relative_error(whole, exact) < (1e-14 if dtype == torch.float64 else 1e-6)
    a[4, -1, 2] = torch.inf
    others = torch.arange(19) != 4
    spoilt = op(a, g, True, 512, 3)
    assert not spoilt[4].isfinite().all()
    assert torch.equal(spoilt[others], whole[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_tensor_sketch_from_factors(dtype: torch.dtype, bias: bool) -> None:
    op = torch.ops.unlearn_kernels.tensor_sketch
    for k in (1, 4, 64, 1024):
        a, g = randn(3, 70, 37, dtype=dtype), randn(3, 70, 11, dtype=dtype, seed=1)
        ones = torch.ones(3, 70, 1, dtype=dtype)
        grads = g.mT.double() @ torch.cat([a, ones], 2).double() if bias else g.mT.double() @ a.double()
        p = Projection(11 * (37 + bias), k, "tensorsketch", 9, shape=(11, 37 + bias))
        expected = p(grads.flatten(1))
        eager = sketches.tensor_sketch(a, g, bias, k, 9)
        assert_as_exact_as(
            "y", op(a, g, bias, k, 9), expected, eager, floor=2e-6 if dtype != torch.float64 else 1e-14
        )
    strided = op(a.mT.contiguous().mT, g[:, :, :].transpose(0, 1).contiguous().transpose(0, 1), bias, 64, 9)
    assert relative_error(strided, op(a, g, bias, 64, 9)) < 1e-6
    assert torch.equal(op(a[:, :0], g[:, :0], bias, 64, 9), torch.zeros_like(strided))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_sided_stays_within_its_scratch(dtype: torch.dtype) -> None:
    """Neither the gradients are copied as a whole, nor are signs int64 all at once."""
    p = Projection(512 * 4096, 256, "two_sided", 3, shape=(512, 4096), sides=(16, 16))
    g = randn(3, 4096).repeat_interleave(512, 0).view(3, -1).to(dtype)
    assert max(allocated(lambda: p(g))) <= 8 << 20
    whole = p(g)
    for offset, size in ((5, 4000), (4096, 8192), (100, 3 * 4096)):
        part = torch.zeros_like(g)
        part[:, offset : offset + size] = g[:, offset : offset + size]
        assert relative_error(p.project_part(g[:, offset : offset + size], offset), p(part).double()) < 1e-5
    assert relative_error(whole, p(g.double())) < 1e-5
    assert torch.equal(p.project_part(g[:, :0], 4100), torch.zeros(3, 256))


def allocated(call: Callable[[], object]) -> list[int]:
    """Bytes of every allocation."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = profile.profiler.kineto_results.events()
    return [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]


def test_two_sided_is_the_product() -> None:
    p = make("two_sided")
    left, right = p.matrices()
    g = randn(3, 5 * 1237)
    whole = left.double() @ g.double().unflatten(1, (5, 1237)) @ right.double().T
    assert relative_error(p(g), whole.flatten(1)) < 1e-6
    with pytest.raises(ValueError, match="kind must be 'two_sided' to have matrices, got 'sjlt'"):
        make("sjlt").matrices()


@KINDS
def test_vmap_and_leading_dimensions(kind: str) -> None:
    p, g = make(kind), randn(2, 3, 5 * 1237)
    flat = p(g.flatten(0, 1)).unflatten(0, (2, 3))
    assert relative_error(p(g), flat) < 1e-6
    assert relative_error(torch.vmap(p)(g), flat) < 1e-6


@KINDS
def test_project_rows(kind: str) -> None:
    p, g = make(kind), randn(2, 2, 1237)
    whole = torch.zeros(2, 5, 1237)
    whole[:, [3, 1]] = g
    assert relative_error(p.project_rows(g, torch.tensor([3, 1])), p(whole.flatten(1))) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sjlt", "terms": 0}, "terms must be between 1 and k = 8, got 0"),
        ({"kind": "sjlt", "terms": 17}, "terms must be between 1 and k = 8, got 17"),
        ({"kind": "srht", "terms": 1}, "terms must be None for kind 'srht', got 1"),
        ({"kind": "tensorsketch"}, "shape must be given for kind 'tensorsketch'"),
        ({"kind": "tensorsketch", "shape": (5, 5)}, r"shape must have a product of 24, got \(5, 5\)"),
        ({"kind": "tensorsketch", "shape": (4, 6), "k": 12}, "k must be a power of two"),
        ({"kind": "two_sided", "shape": (4, 6)}, "sides must be given for kind 'two_sided'"),
        ({"kind": "two_sided", "shape": (4, 6), "sides": (3, 3)}, "sides must have a product of k = 8"),
        ({"kind": "two_sided", "shape": (4, 6), "sides": (2, 4), "seed": 1 << 62}, r"less than 2\^62"),
        ({"kind": "gaussian", "k": (1 << 31) + 1}, r"k must be at most 2\^31"),
    ],
)
def test_constructor_errors(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Projection(**({"dim": 24, "k": 8} | arguments))


def test_part_errors() -> None:
    p = make("gaussian")
    with pytest.raises(ValueError, match=r"offset \+ n at most 6185, got \(1, 10\) at 6180"):
        p.project_part(torch.zeros(1, 10), 6180)
    with pytest.raises(ValueError, match="y must have 64"):
        p.adjoint(torch.zeros(3))
    with pytest.raises(ValueError, match="offset and size"):
        p.adjoint(torch.zeros(64), offset=6000, size=200)
    with pytest.raises(RuntimeError, match="offset must be a multiple of 8, got 4"):
        torch.ops.unlearn_kernels.normal_project(torch.zeros(1, 10), 4, 0, 4)


@KINDS
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers_from_factors(kind: str, bias: bool) -> None:
    """`tensorsketch` and `two_sided` take a matrix: with a bias the matrix is of another shape."""
    a, g = randn(3, 9, 6), randn(3, 9, 5, seed=1)
    dim = 5 * 6 + 5 * bias
    more = {"shape": (5, 6 + bias)} if kind in ("two_sided", "tensorsketch") else {}
    more |= {"sides": (2, 4)} if kind == "two_sided" else {}
    p = Projection(dim, 8, kind, 3, **more)
    grads = linear.grads(a, g, bias=bias)
    flat = grads.weight.flatten(1) if not bias else torch.cat([grads.weight.flatten(1), grads.bias], 1)
    assert relative_error(linear.project(a, g, p, bias=bias), p(flat)) < 1e-6

"""Per-sample gradients of normalisation layers, against autograd in float64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import norm
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.reference.per_sample import norm as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn, relative_error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
EPS = 1e-5
KINDS: dict[str, dict[str, Any]] = {"layer": {}, "rms": {}, "group": {"num_groups": 2}}
# One element; odd; more than a vector; several runs of tokens or chunks of positions.
TOKENS = [(1, 1, 1), (3, 7, 5), (2, 9, 33), (2, 203, 70), (40, 3, 17)]
CHANNELS = [(1, 4, 1), (3, 6, 7), (2, 4, 5, 9), (1, 4, 3, 41, 50)]
SHAPES = [(k, s) for k in ("layer", "rms") for s in TOKENS] + [("group", s) for s in CHANNELS]
CASES = pytest.mark.parametrize(("kind", "shape"), SHAPES, ids=str)
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def pair(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.5
) -> tuple[Tensor, Tensor]:
    x, g = (randn(*shape, dtype=torch.float64, seed=seed) for seed in (0, 1))
    return (x + offset).to(dtype), g.to(dtype)


def sample_shape(kind: str) -> tuple[int, ...]:
    return (5, 6, 70) if kind == "group" else (5, 70, 12)


def forward(kind: str, x: Tensor, weight: Tensor, bias: Tensor, num_groups: int = 0) -> Tensor:
    """The layer as torch.nn.functional has it."""
    if kind == "group":
        return functional.group_norm(x, num_groups, weight, bias, EPS)
    if kind == "rms":
        return functional.rms_norm(x, weight.shape, weight, EPS) + bias
    return functional.layer_norm(x, weight.shape, weight, bias, EPS)


def by_autograd(kind: str, x: Tensor, g: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """One backward a sample, in float64."""
    scale = x.shape[1:2] if kind == "group" else x.shape[-1:]
    weight, bias = (torch.ones(scale, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pairs = [
        torch.autograd.grad(forward(kind, i[None], weight, bias, **options), (weight, bias), u[None])
        for i, u in zip(x.double(), g.double(), strict=True)
    ]
    return torch.stack([w for w, _ in pairs]), torch.stack([b for _, b in pairs])


def raw(kind: str, x: Tensor, g: Tensor, bias: bool, num_groups: int = 1) -> tuple[Any, ...]:
    """The arguments of the reference in the type that is accumulated in."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (*x.shape[:2], -1) if kind == "group" else (len(x), -1, x.shape[-1])
    return x.to(wide).reshape(shape), g.to(wide).reshape(shape), norm._CODES[kind], num_groups, EPS, bias


def check(kind: str, x: Tensor, g: Tensor) -> Tensor:
    """Norms and gradients of scale and bias; the norms with the bias."""
    options = {"kind": kind, "eps": EPS, **KINDS[kind]}
    weight, bias = by_autograd(kind, x, g, **KINDS[kind])
    both = raw(kind, x, g, True, **KINDS[kind])
    eager = reference.norm_grads(*both)
    found = norm.grads(x, g, bias=True, **options)
    assert_as_exact_as("weight", found.weight, weight, eager[:, 0])
    assert_as_exact_as("bias", found.bias, bias, eager[:, 1])
    assert norm.grads(x, g, **options).bias is None
    exact = weight.square().sum(1)
    alone = norm.sqnorms(x, g, **options)
    assert alone.dtype == eager.dtype
    assert_as_exact_as("norms", alone, exact, reference.norm_sqnorms(*both[:-1], False))
    result = norm.sqnorms(x, g, bias=True, **options)
    assert_as_exact_as("norms with bias", result, exact + bias.square().sum(1), reference.norm_sqnorms(*both))
    return result


@EACH_KIND
def test_reference_is_autograd(kind: str) -> None:
    x, g = pair(sample_shape(kind), torch.float64)
    weight, bias = by_autograd(kind, x, g, **KINDS[kind])
    found = reference.norm_grads(*raw(kind, x, g, True, **KINDS[kind]))
    torch.testing.assert_close(found, torch.stack([weight, bias], 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CASES
def test_sizes_and_dtypes(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(kind, *pair(shape, dtype))


@EACH_KIND
def test_mixed_types(kind: str) -> None:
    x, g = pair(sample_shape(kind))
    check(kind, x, g.bfloat16())
    check(kind, x.half(), g)
    check(kind, x.bfloat16(), g.half())


def test_dimensions_between_and_shapes_of_the_scale() -> None:
    x, g = pair((3, 4, 5, 6))
    call = partial(norm.sqnorms, eps=EPS, bias=True)
    assert torch.equal(call(x, g), call(x.flatten(1, 2), g.flatten(1, 2)))
    check("layer", x[:, 0, 0], g[:, 0, 0])
    flat = call(x.flatten(2), g.flatten(2))
    for shape in ((5, 6), [5, 6], torch.Size((5, 6))):
        assert torch.equal(call(x, g, normalized_shape=shape), flat)
    found = norm.grads(x, g, eps=EPS, normalized_shape=(5, 6), bias=True)
    assert found.weight.shape == found.bias.shape == (3, 5, 6)
    assert torch.equal(call(x, g, normalized_shape=6), call(x, g))
    assert norm.weighted_sum(x, g, torch.ones(3), eps=EPS, normalized_shape=(5, 6)).weight.shape == (5, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_KIND
def test_strides(kind: str, dtype: torch.dtype) -> None:
    x, g = pair(sample_shape(kind), dtype)
    expected = check(kind, x, g)
    options = {"kind": kind, "eps": EPS, "bias": True, **KINDS[kind]}
    assert torch.equal(
        norm.sqnorms(x.mT.contiguous().mT, g.repeat_interleave(2, 2)[..., ::2], **options), expected
    )
    assert torch.equal(norm.sqnorms(x.transpose(0, 1).contiguous().transpose(0, 1), g, **options), expected)
    assert torch.equal(norm.sqnorms(x.flip(0), g.flip(0), **options), expected.flip(0))
    check(kind, x[:, :1].expand_as(g), g)
    check(kind, x, g[..., :1].expand_as(g))


def test_channels_last_images() -> None:
    x, g = pair((2, 4, 30, 23))
    expected = check("group", x, g)
    x, g = (t.contiguous(memory_format=torch.channels_last) for t in (x, g))
    torch.testing.assert_close(check("group", x, g), expected, rtol=1e-6, atol=0)


@EACH_KIND
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_a_large_mean_costs_no_more_digits_than_its_rounding(kind: str, offset: float) -> None:
    """One pass over sums of squares would lose all digits here."""
    shape = (2, 4, 5000) if kind == "group" else (2, 100, 300)
    check(kind, *pair(shape, offset=offset))


def test_group_whose_parts_differ() -> None:
    """A first chunk that says little of the others: statistics are merged, not taken from it."""
    x, g = pair((1, 2, 9000))
    x[..., :2048] = 1e-3 * x[..., :2048] + 7
    x[..., 4096:] *= 30
    check("group", x, g)


def test_constant_inputs() -> None:
    x, g = torch.full((2, 8, 16), 3.0), randn(2, 8, 16)
    for kind in KINDS:
        found = norm.grads(x, g, kind=kind, eps=EPS, **KINDS[kind])
        exact = by_autograd(kind, x, g, **KINDS[kind])[0]
        assert (found.weight - exact).abs().max() <= 1e-5


@EACH_KIND
def test_variants_whose_scale_is_one_plus_w(kind: str) -> None:
    """Gemma's scale is 1 + w; it has the gradient of w."""
    x, g = pair(sample_shape(kind))
    weight, bias = by_autograd(kind, x, g, **KINDS[kind])
    scale = torch.zeros_like(weight[0]).requires_grad_()
    forward(kind, x.double(), 1 + scale, bias[0], **KINDS[kind]).backward(g.double())
    total = norm.weighted_sum(x, g, torch.ones(5), kind=kind, eps=EPS, **KINDS[kind]).weight
    torch.testing.assert_close(total.double(), scale.grad, rtol=1e-5, atol=1e-5)


@EACH_KIND
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_sample(kind: str, value: float) -> None:
    options = {"kind": kind, "eps": EPS, "bias": True, **KINDS[kind]}
    for index in (0, 1):
        both = pair(sample_shape(kind))
        clean = norm.sqnorms(*both, **options)
        both[index][1, 2, 3] = value
        result = norm.sqnorms(*both, **options)
        assert not result[1].isfinite() or (index == 0 and value != torch.nan and kind == "rms")
        assert torch.equal(result[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


@EACH_KIND
def test_fp16_of_loss_scale_size_is_exact_and_finite(kind: str) -> None:
    x, g = pair(sample_shape(kind), torch.float64)
    for scale in (10, 10000):
        half = (scale * g).clamp(-6e4, 6e4).half()
        result = norm.sqnorms(x.half(), half, kind=kind, eps=EPS, bias=True, **KINDS[kind])
        weight, bias = by_autograd(kind, x.half(), half, **KINDS[kind])
        exact = weight.square().sum(1) + bias.square().sum(1)
        assert ((result - exact) / exact).abs().max() <= 1e-6


@CASES
def test_same_bits_at_every_thread_count(kind: str, shape: tuple[int, ...]) -> None:
    x, g = pair(shape)
    options = {"kind": kind, "eps": EPS, "bias": True, **KINDS[kind]}

    def everything() -> list[Tensor]:
        return [
            norm.sqnorms(x, g, **options),
            norm.grads(x, g, **options).weight,
            norm.dots(x, g, x, g, **options),
        ]

    first, *others = at_threads((1, 2, 4, 3), everything)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 0, 6), (2, 4, 0), (0, 0, 0)], ids=str)
@EACH_KIND
def test_empty(kind: str, shape: tuple[int, ...]) -> None:
    x, options = torch.zeros(shape), {"kind": kind, "eps": EPS, **KINDS[kind]}
    assert torch.equal(norm.sqnorms(x, x, bias=True, **options), torch.zeros(shape[0]))
    scales = shape[1] if kind == "group" else shape[2]
    assert torch.equal(norm.grads(x, x, **options).weight, torch.zeros(shape[0], scales))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_KIND
def test_dots(kind: str, dtype: torch.dtype) -> None:
    x1, g1 = pair(sample_shape(kind), dtype)
    x2, g2 = (
        t[:3, :, :40] if kind == "group" else t[:3, :40] for t in pair(sample_shape(kind), dtype, offset=-1)
    )
    options = {"kind": kind, "eps": EPS, **KINDS[kind]}
    for bias in (False, True):
        one, two = (
            torch.cat(by_autograd(kind, x, g, **KINDS[kind])[: 1 + bias], 1) for x, g in ((x1, g1), (x2, g2))
        )
        exact, scale = one @ two.T, one.norm(dim=1)[:, None] * two.norm(dim=1)
        found = norm.dots(x1, g1, x2, g2, bias=bias, **options)
        eps = torch.finfo(found.dtype).eps
        assert ((found - exact).abs() <= 16 * eps * scale).all()
        summed = norm.dots(x1, g1, x2, g2, bias=bias, summed=True, **options)
        assert ((summed - exact.sum(1)).abs() <= 16 * eps * scale.sum(1)).all()
    torch.testing.assert_close(
        norm.dots(x1, g1, x1, g1, bias=True, **options).diagonal(), norm.sqnorms(x1, g1, bias=True, **options)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@EACH_KIND
def test_weighted_sum_and_project(kind: str, dtype: torch.dtype) -> None:
    x, g = pair(sample_shape(kind), dtype)
    options = {"kind": kind, "eps": EPS, **KINDS[kind]}
    w = torch.tensor([0.5, -2.0, 0.0, 1.0, 3.0])
    weight, bias = by_autograd(kind, x, g, **KINDS[kind])
    found = norm.weighted_sum(x, g, w, bias=True, **options)
    for name, total, rows in (("weight", found.weight, weight), ("bias", found.bias, bias)):
        assert total.dtype == dtype, name
        assert relative_error(total, w.double() @ rows) <= 4 * torch.finfo(dtype).eps
    for with_bias, rows in ((False, weight), (True, torch.cat([weight, bias], 1))):
        projection = Projection(rows.shape[1], 9, seed=2)
        y = norm.project(x, g, projection, bias=with_bias, **options)
        assert relative_error(y, projection(rows)) <= 16 * torch.finfo(y.dtype).eps


def test_peer_parity() -> None:
    """Opacus forms the gradients: the same norms, with all of X normalised in memory."""
    sampler = pytest.importorskip("opacus.grad_sample.grad_sample_module").GradSampleModule
    for layer, shape, options in (
        (nn.LayerNorm(24), (6, 40, 24), {"kind": "layer", "bias": True}),
        (nn.RMSNorm(24, eps=1e-6), (6, 40, 24), {"kind": "rms"}),
        (nn.GroupNorm(3, 12), (6, 12, 5, 7), {"kind": "group", "bias": True, "num_groups": 3}),
    ):
        x, g = pair(shape)
        compute = sampler.GRAD_SAMPLERS[type(layer)]
        theirs = sum(v.flatten(1).square().sum(1) for v in compute(layer, [x], g).values())
        torch.testing.assert_close(norm.sqnorms(x, g, eps=layer.eps, **options), theirs, rtol=1e-5, atol=0)


X, G = pair((2, 6, 4))
ERRORS: dict[str, dict[str, Any]] = {
    "X and G must have the same shape, got (2, 6, 4) and (2, 5, 4)": {"G": G[:, :5]},
    "X must have at least 2 dimensions": {"X": X[0, 0], "G": G[0, 0]},
    "G must be a floating-point tensor": {"G": G.long()},
    "X and G must both be float64 or neither": {"X": X.double()},
    "kind must be one of layer, rms, group, got 'batch'": {"kind": "batch"},
    "eps must not be negative, got -1": {"eps": -1},
    "eps must not be negative, got nan": {"eps": float("nan")},
    "num_groups must divide the 6 channels, got 4": {"kind": "group", "num_groups": 4},
    "num_groups must divide the 6 channels, got None": {"kind": "group"},
    "num_groups must be None for kind 'rms', got 2": {"kind": "rms", "num_groups": 2},
    "normalized_shape must be the last dimensions of X (2, 6, 4), got (6,)": {"normalized_shape": 6},
    "normalized_shape must be None for kind 'group'": {
        "kind": "group",
        "num_groups": 2,
        "normalized_shape": 4,
    },
}


@pytest.mark.parametrize(("message", "change"), ERRORS.items(), ids=list(ERRORS))
def test_errors_name_the_argument(message: str, change: dict[str, Any]) -> None:
    arguments = {"X": X, "G": G, "kind": "layer", "eps": EPS, **change}
    for call in (norm.sqnorms, norm.grads):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            call(arguments["X"], arguments["G"], **{k: v for k, v in arguments.items() if k not in "XG"})
        assert str(error.value).startswith(message)


def test_errors_of_the_other_verbs() -> None:
    with pytest.raises(ValueError, match="X1 and X2 must have the same scale"):
        norm.dots(X, G, X[..., :3], G[..., :3], eps=EPS)
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        norm.weighted_sum(X, G, torch.ones(3), eps=EPS)
    for projection in (Projection(8, 2), TwoSided(torch.ones(1, 4), torch.ones(1, 4))):
        with pytest.raises(ValueError, match="projection must be a Projection of 4 coordinates"):
            norm.project(X, G, projection, eps=EPS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], G, 0, 1, EPS, True), "3 dimensions"),
        ((X, G[:, :2], 0, 1, EPS, True), "same shape"),
        ((X.double(), G, 0, 1, EPS, True), "float64 cannot be mixed"),
        ((X, G, 3, 1, EPS, True), "unknown kind 3"),
        ((X, G, 2, 4, EPS, True), "6 channels cannot be cut into 4 groups"),
        ((X, G, 2, 0, EPS, True), "6 channels cannot be cut into 0 groups"),
        ((X.long(), G, 0, 1, EPS, True), "must be float32"),
    ],
)
def test_the_raw_operators_guard_memory(arguments: tuple[object, ...], message: str) -> None:
    for op in ("norm_sqnorms", "norm_grads"):
        with pytest.raises(RuntimeError, match=message):
            getattr(torch.ops.unlearn_kernels, op)(*arguments)


def test_takes_no_part_in_autograd_and_compiles() -> None:
    assert not norm.sqnorms(X.clone().requires_grad_(), G, eps=EPS).requires_grad
    torch._dynamo.reset()
    call = partial(norm.dots, eps=EPS, bias=True)
    compiled = torch.compile(lambda x, g: call(x, g, x, g) + 1, fullgraph=True, backend="aot_eager")
    for length in (6, 4):
        x, g = X[:, :length], G[:, :length]
        torch.testing.assert_close(compiled(x, g), call(x, g, x, g) + 1)
    torch._dynamo.reset()


def test_offsets_beyond_two_to_the_31() -> None:
    """Samples so far apart that their offsets need 64 bits; only the pages that are read come into being."""
    x = torch.empty_strided((2, 3, 4), (2**31 + 8, 4, 1), dtype=torch.float16)
    x.copy_(randn(2, 3, 4))
    g = randn(2, 3, 4, dtype=torch.float16, seed=1)
    for kind in KINDS:
        options = {"kind": kind, "eps": EPS, **({"num_groups": 3} if kind == "group" else {})}
        assert torch.equal(norm.sqnorms(x, g, **options), norm.sqnorms(x.clone(), g, **options))

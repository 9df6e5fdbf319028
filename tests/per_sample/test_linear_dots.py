"""Inner products of per-sample gradients of a linear layer, against autograd in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as apply_linear

from unlearn_kernels.per_sample import linear
from unlearn_kernels.reference.per_sample.linear import linear_dots as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
METHODS = ["tokens", "direct"]
# (B1, T1, B2, T2, d, p): one element; primes below a register tile; samples that share tiles and samples that
# fill several; more held samples than fit at once; one token.
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (3, 5, 2, 7, 7, 3),
    (4, 131, 3, 67, 33, 9),
    (2, 300, 3, 5, 17, 130),
    (19, 3, 37, 2, 130, 35),
    (40, 1, 21, 1, 20, 50),
]
Sides = tuple[Tensor, Tensor, Tensor, Tensor]


def sides(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Sides:
    b1, t1, b2, t2, d, p = size
    shapes = (b1, t1, d), (b1, t1, p), (b2, t2, d), (b2, t2, p)
    return tuple(randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))


def flat_by_autograd(a: Tensor, g: Tensor, bias: bool) -> Tensor:
    """The definition, in float64: one backward a sample."""
    rows = []
    for x, upstream in zip(a.double(), g.double(), strict=True):
        weight = torch.zeros(g.shape[-1], a.shape[-1], dtype=torch.float64, requires_grad=True)
        offset = torch.zeros(g.shape[-1], dtype=torch.float64, requires_grad=True)
        of_weight, of_offset = torch.autograd.grad(
            apply_linear(x, weight, offset), (weight, offset), upstream
        )
        rows.append(torch.cat([of_weight.flatten(), of_offset * bias]))
    return torch.stack(rows)


def by_tokens(tensors: Sides, bias: bool) -> tuple[Tensor, Tensor]:
    """The sum over pairs of tokens, and the sum of its terms' magnitudes."""
    a1, g1, a2, g2 = tensors
    terms = (torch.einsum("itd,jsd->ijts", a1, a2) + bias) * torch.einsum("itp,jsp->ijts", g1, g2)
    return terms.sum((2, 3)), terms.abs().sum((2, 3))


def check(tensors: Sides, *, summed: bool = False, bias: bool = True, method: str = "auto") -> None:
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    result = linear.dots(*tensors, summed=summed, bias=bias, method=method)
    assert result.dtype == wide
    one, two = (flat_by_autograd(*tensors[i : i + 2], bias) for i in (0, 2))
    two = two.sum(0, keepdim=True) if summed else two
    exact, terms = one @ two.T, one.abs() @ two.abs().T
    eager = reference(*(x.to(wide) for x in tensors), summed, bias, 0)
    if method == "tokens":
        eager, terms = by_tokens(tuple(x.to(wide) for x in tensors), bias)
        eager, terms = (x.sum(1, keepdim=summed) if summed else x for x in (eager, terms))
    # A rounding of each term counts as often as the terms exceed their sum.
    condition = terms.double().norm().item() / exact.norm().item()
    exact, eager = (x.reshape(result.shape) for x in (exact, eager))
    floor = 4 * torch.finfo(wide).eps * condition
    assert_as_exact_as(f"dots by {method}", result, exact, eager, floor=floor)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_reference_is_autograd(summed: bool, bias: bool) -> None:
    tensors = sides((3, 5, 2, 7, 7, 3), torch.float64)
    one, two = (flat_by_autograd(*tensors[i : i + 2], bias) for i in (0, 2))
    exact = one @ (two.sum(0) if summed else two.T)
    torch.testing.assert_close(reference(*tensors, summed, bias, 0), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size: tuple[int, ...], dtype: torch.dtype, method: str, summed: bool) -> None:
    for bias in (False, True):
        check(sides(size, dtype), summed=summed, bias=bias, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("summed", [False, True])
def test_several_tiles(summed: bool, method: str) -> None:
    check(sides((3, 70, 2, 200, 300, 210)), summed=summed, method=method)
    check(sides((2, 200, 18, 70, 100, 210)), summed=summed, method=method)


@pytest.mark.parametrize("samples", [1, 4])
def test_every_split_of_a_validation_batch(samples: int) -> None:
    """GhostSuite flattens batch and tokens of the validation half and is right for one sample alone."""
    a1, g1, a2, g2 = sides((5, 6, samples, 6, 11, 7), torch.float64)
    one, two = flat_by_autograd(a1, g1, True), flat_by_autograd(a2, g2, True)
    for method in METHODS:
        pairs = linear.dots(a1, g1, a2, g2, bias=True, method=method)
        total = linear.dots(a1, g1, a2, g2, bias=True, method=method, summed=True)
        torch.testing.assert_close(pairs, one @ two.T, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(total, one @ two.sum(0), rtol=1e-12, atol=1e-12)
        for cut in range(1, samples):
            parts = [
                linear.dots(a1, g1, a2[s], g2[s], bias=True, method=method, summed=True)
                for s in (slice(cut), slice(cut, None))
            ]
            torch.testing.assert_close(parts[0] + parts[1], total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_with_itself_holds_the_norms(method: str) -> None:
    a, g = randn(6, 9, 13), randn(6, 9, 8, seed=1)
    products = linear.dots(a, g, a, g, bias=True, method=method)
    torch.testing.assert_close(products.diagonal(), linear.sqnorms(a, g, bias=True))
    torch.testing.assert_close(products, products.T)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype, method: str, summed: bool) -> None:
    a1, g1, a2, g2 = sides((5, 20, 3, 7, 9, 12), dtype)
    expected = linear.dots(a1, g1, a2, g2, summed=summed, bias=True, method=method)
    for layout in (
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    ):
        moved = [layout(x) for x in (a1, g1, a2, g2)]
        assert torch.equal(linear.dots(*moved, summed=summed, bias=True, method=method), expected)
    expanded = [x[:1].expand(4, -1, -1) for x in (a1, g1)]
    result = linear.dots(*expanded, a2, g2, summed=summed, bias=True, method=method)
    same = linear.dots(*(x.contiguous() for x in expanded), a2, g2, summed=summed, bias=True, method=method)
    assert torch.equal(result, same)


def test_dimensions_between_fold_into_tokens() -> None:
    a1, g1, a2, g2 = sides((3, 12, 2, 6, 5, 4))
    shaped = [
        a1.unflatten(1, (3, 4)),
        g1.unflatten(1, (3, 4)),
        a2.unflatten(1, (2, 3)),
        g2.unflatten(1, (2, 3)),
    ]
    assert torch.equal(linear.dots(*shaped), linear.dots(a1, g1, a2, g2))
    flat = [x[:, 0] for x in (a1, g1, a2, g2)]
    assert torch.equal(linear.dots(*flat), linear.dots(*(x[:, :1] for x in (a1, g1, a2, g2))))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("summed", [False, True])
def test_empty(summed: bool, method: str) -> None:
    sizes = [
        (0, 2, 3, 2, 4, 5),
        (2, 0, 3, 2, 4, 5),
        (2, 3, 0, 4, 4, 5),
        (2, 3, 2, 0, 4, 5),
        (2, 3, 2, 4, 0, 5),
    ]
    for size in [*sizes, (2, 3, 2, 4, 5, 0)]:
        tensors = sides(size)
        result = linear.dots(*tensors, summed=summed, bias=True, method=method)
        expected = reference(*tensors, summed, True, 0)
        torch.testing.assert_close(result, expected, msg=str(size))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_pairs(value: float, method: str) -> None:
    a1, g1, a2, g2 = sides((4, 5, 3, 7, 9, 6))
    clean = linear.dots(a1, g1, a2, g2, bias=True, method=method)
    a2[1, 2, 3] = value
    result = linear.dots(a1, g1, a2, g2, bias=True, method=method)
    assert not result[:, 1].isfinite().any()
    assert torch.equal(result[:, ::2], clean[:, ::2])
    a1[2, 0, 0] = value
    assert not linear.dots(a1, g1, a2, g2, method=method, summed=True).isfinite().any()


def test_large_half_values_do_not_overflow() -> None:
    tensors = tuple((30 * x).half() for x in sides((3, 40, 2, 30, 24, 18), torch.float64))
    for method in METHODS:
        check(tensors, method=method)


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [(7, 61, 5, 67, 210, 200), (40, 30, 35, 3, 65, 70)], ids=str)
def test_same_bits_at_every_thread_count(size: tuple[int, ...], method: str, summed: bool) -> None:
    tensors = sides(size)
    first, *others = at_threads(
        (1, 2, 4), lambda: linear.dots(*tensors, summed=summed, bias=True, method=method)
    )
    for other in others:
        assert torch.equal(first, other)


def test_auto_takes_the_cheaper() -> None:
    long_thin, short_wide = sides((4, 300, 3, 300, 8, 8)), sides((4, 3, 3, 5, 300, 200))
    for tensors, expected in ((long_thin, "direct"), (short_wide, "tokens")):
        choice = linear.explain_dots(*tensors)
        assert choice.method == expected
        assert (choice.tokens <= choice.direct) == (expected == "tokens")
        assert torch.equal(linear.dots(*tensors), linear.dots(*tensors, method=expected))
    train_on_sum = linear.explain_dots(*sides((16, 64, 4, 64, 48, 48)), summed=True)
    assert train_on_sum.method == "direct"


A, G = randn(2, 3, 5), randn(2, 3, 4, seed=1)
ERRORS = {
    "A1 must have at least 2 dimensions": (A[0, 0], G, A, G),
    "G2 must be a floating-point tensor, got torch.int64": (A, G, A, G.long()),
    "A2 and G2 must agree in all dimensions but the last": (A, G, A, G[:, :2]),
    "A1 and A2 must agree in the last dimension, got 5 and 3": (A, G, A[..., :3], G),
    "G1 and G2 must agree in the last dimension, got 4 and 2": (A, G, A, G[..., :2]),
    "A1 and A2 must both be float64 or neither": (A, G, A.double(), G.double()),
    "A1 and G2 must be on one device": (A, G, A, G.to("meta")),
}


@pytest.mark.parametrize(("message", "tensors"), ERRORS.items(), ids=list(ERRORS))
def test_errors_name_the_argument(message: str, tensors: Sides) -> None:
    for call in (linear.dots, linear.explain_dots):
        with pytest.raises(ValueError, match=message):
            call(*tensors)


def test_error_of_method() -> None:
    with pytest.raises(ValueError, match="method must be one of auto, tokens, direct, got 'gram'"):
        linear.dots(A, G, A, G, method="gram")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((A[0], G, A, G), "3 dimensions"),
        ((A, G, A, G[:, :2]), "agree in batch and tokens"),
        ((A, G, A[..., :3], G), "agree in features"),
        ((A, G, A.double(), G.double()), "float64 cannot be mixed"),
    ],
)
def test_the_raw_operator_guards_memory(arguments: Sides, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.unlearn_kernels.linear_dots(*arguments, False, True, 0)
    with pytest.raises(RuntimeError, match="method must be 0 or 1"):
        torch.ops.unlearn_kernels.linear_dots(A, G, A, G, False, True, 2)

"""Inner products, weighted sums, gradients and projections of an embedding's per-sample gradients."""

import pytest
import torch
from torch import Tensor

from tests.per_sample.embeddings import DTYPES, WIDE, by_autograd, tokens
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import embedding
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.reference.per_sample import embedding as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn, relative_error

Side = tuple[Tensor, Tensor]
# (B1, T1, B2, T2, V, d)
PAIRS = [(1, 1, 1, 1, 1, 1), (3, 7, 2, 11, 5, 3), (5, 60, 4, 33, 300, 130), (2, 300, 3, 400, 9, 300)]


def pair(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Side, Side]:
    b1, t1, b2, t2, rows, width = size
    return tokens(b1, t1, rows, width, dtype), tokens(b2, t2, rows, width, dtype, seed=5)


def check_dots(one: Side, two: Side, rows: int, padding_idx: int | None, summed: bool) -> Tensor:
    result = embedding.dots(*one, *two, num_embeddings=rows, padding_idx=padding_idx, summed=summed)
    left, right = (by_autograd(*side, rows, padding_idx).flatten(1) for side in (one, two))
    right = right.sum(0, keepdim=True) if summed else right
    exact = left @ right.T
    scale = left.norm(dim=1)[:, None] * right.norm(dim=1)
    wide = torch.float64 if torch.float64 in (one[1].dtype, two[1].dtype) else torch.float32
    assert result.dtype == wide
    error = (result.reshape(exact.shape) - exact).abs()
    assert (error <= 4 * torch.finfo(wide).eps * scale).all()
    return result


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", PAIRS, ids=str)
def test_dots(size: tuple[int, ...], dtype: torch.dtype, summed: bool) -> None:
    one, two = pair(size, dtype)
    shape = size[:1] if summed else (size[0], size[2])
    for padding_idx in (None, 0):
        assert check_dots(one, two, size[4], padding_idx, summed).shape == shape


@pytest.mark.parametrize("validation", [1, 4])
def test_dots_with_a_sum_of_any_number(validation: int) -> None:
    """The sum of products, not the product of sums: that is where peers err for more than one sample."""
    one, two = pair((6, 20, validation, 30, 12, 40))
    pairwise = embedding.dots(*one, *two, num_embeddings=12)
    summed = embedding.dots(*one, *two, num_embeddings=12, summed=True)
    torch.testing.assert_close(pairwise.double().sum(1), summed.double(), rtol=1e-5, atol=1e-4)


def test_dots_with_itself_has_the_norms_on_its_diagonal() -> None:
    side, _ = pair((7, 40, 1, 1, 15, 30))
    gram = embedding.dots(*side, *side, num_embeddings=15)
    assert torch.equal(gram, gram.T)
    torch.testing.assert_close(
        gram.diagonal(), embedding.sqnorms(*side, num_embeddings=15), rtol=1e-6, atol=0
    )


def test_one_table_used_twice_by_the_same_samples() -> None:
    """|W + W'|^2 = |W|^2 + |W'|^2 + 2 <W, W'>, and the tokens of both in one call."""
    (ids, g), (ids2, g2) = pair((4, 30, 4, 22, 10, 24))
    cross = embedding.dots(ids, g, ids2, g2, num_embeddings=10).diagonal()
    apart = embedding.sqnorms(ids, g, num_embeddings=10) + embedding.sqnorms(ids2, g2, num_embeddings=10)
    both = embedding.sqnorms(torch.cat([ids, ids2], 1), torch.cat([g, g2], 1), num_embeddings=10)
    torch.testing.assert_close(apart + 2 * cross, both, rtol=1e-6, atol=0)
    twice = embedding.dots(ids, g, ids, g2.repeat(1, 2, 1)[:, :30], num_embeddings=10)
    assert twice.shape == (4, 4)


def test_dots_of_mixed_types_strides_and_positions() -> None:
    (ids, g), (ids2, g2) = pair((3, 20, 2, 20, 25, 12))
    check_dots((ids, g.bfloat16()), (ids2, g2), 25, None, False)
    check_dots((ids, g.half()), (ids2.int(), g2.bfloat16()), 25, None, True)
    check_dots((ids.T.contiguous().T, g.mT.contiguous().mT), (ids2, g2.flip(1).flip(1)), 25, 3, False)
    positions = torch.arange(20)
    expected = embedding.dots(positions.expand(3, 20), g, positions.expand(2, 20), g2, num_embeddings=25)
    assert torch.equal(embedding.dots(positions, g, positions[None], g2, num_embeddings=25), expected)
    torch.testing.assert_close(expected, g.flatten(1) @ g2.flatten(1).T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_dots_keep_what_is_not_finite_in_its_row(value: float) -> None:
    one, two = pair((3, 20, 2, 30, 4, 10))
    clean = embedding.dots(*one, *two, num_embeddings=4)
    one[1][1, 2, 3] = value
    result = embedding.dots(*one, *two, num_embeddings=4)
    assert not result[1].isfinite().any()
    assert torch.equal(result[::2], clean[::2])


@pytest.mark.parametrize("summed", [False, True])
def test_dots_of_nothing(summed: bool) -> None:
    ids, g = tokens(3, 5, 6, 4)
    for empty in (slice(0, 0), slice(3, 3)):
        got = embedding.dots(ids, g, ids[empty], g[empty], num_embeddings=6, summed=summed)
        assert torch.equal(got, torch.zeros(3) if summed else torch.zeros(3, 0))
    none = embedding.dots(ids[:, :0], g[:, :0], ids, g, num_embeddings=6, summed=summed)
    assert none.eq(0).all()
    assert embedding.dots(ids, g[..., :0], ids, g[..., :0], num_embeddings=6).eq(0).all()


def test_same_bits_at_every_thread_count() -> None:
    one, two = pair((5, 90, 6, 50, 40, 70))
    w = randn(5)

    def everything() -> list[Tensor]:
        return [
            embedding.dots(*one, *two, num_embeddings=40),
            embedding.dots(*one, *two, num_embeddings=40, summed=True),
            embedding.weighted_sum(*one, w, num_embeddings=40).weight,
            embedding.grads(*one, num_embeddings=40).weight,
        ]

    first, *others = at_threads((1, 2, 4, 3), everything)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(3, 9, 6, 5), (2, 300, 4, 30), (4, 50, 900, 1100)], ids=str)
def test_weighted_sum_and_grads(size: tuple[int, ...], dtype: torch.dtype, padding_idx: int | None) -> None:
    rows, options = size[2], {"num_embeddings": size[2], "padding_idx": padding_idx}
    ids, g = tokens(*size, dtype)
    w = torch.tensor([0.5, -2.0, 0.0, 1.0])[: size[0]]
    exact = by_autograd(ids, g, rows, padding_idx)
    padding = -1 if padding_idx is None else padding_idx
    eager = reference.embedding_grads(ids, g, rows, padding)
    weight, none = embedding.weighted_sum(ids, g, w, **options)
    assert none is None
    assert weight.dtype == dtype
    total = torch.einsum("b,bvd->vd", w.double(), exact)
    assert_as_exact_as("weight", weight, total, torch.einsum("b,bvd->vd", w.to(eager.dtype), eager).to(dtype))
    whole = embedding.grads(ids, g, **options)
    assert whole.weight.dtype == WIDE[dtype]
    assert whole.bias is None
    assert_as_exact_as("grads", whole.weight, exact, eager)


def test_weights_are_applied_in_the_sum_not_in_half_precision() -> None:
    ids, g = tokens(3, 20, 5, 8, torch.float16)
    w = torch.tensor([1e-4, 1e4, 3e-6])
    weight = embedding.weighted_sum(ids, g, w, num_embeddings=5).weight
    exact = torch.einsum("b,bvd->vd", w.double(), by_autograd(ids, g, 5)).half()
    assert torch.equal(weight.isinf(), exact.isinf())


def test_clipping_without_a_second_backward() -> None:
    """Weights min(1, C / |W_i|) give what autograd gives from the loss weighted so."""
    ids, g = tokens(6, 30, 12, 10)
    w = embedding.sqnorms(ids, g, num_embeddings=12).rsqrt().clamp(max=1)
    layer = torch.nn.Embedding(12, 10)
    layer(ids).backward(g * w[:, None, None])
    torch.testing.assert_close(embedding.weighted_sum(ids, g, w, num_embeddings=12).weight, layer.weight.grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(30, 128), (7, 256), (50, 77), (3, 5), (400, 130)])
def test_project_is_the_projection_of_the_gradients(rows: int, width: int, dtype: torch.dtype) -> None:
    ids, g = tokens(4, 25, rows, width, dtype)
    projection = Projection(rows * width, 19, seed=11)
    for padding_idx in (None, 2):
        options = {"num_embeddings": rows, "padding_idx": padding_idx}
        whole = embedding.grads(ids, g, **options).weight
        result = embedding.project(ids, g, projection, **options)
        assert result.dtype == whole.dtype
        assert (
            relative_error(result, projection(whole.double().flatten(1))) <= 8 * torch.finfo(whole.dtype).eps
        )


def test_project_in_several_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, g = tokens(3, 60, 50, 10)
    projection = Projection(500, 8)
    whole = embedding.project(ids, g, projection, num_embeddings=50)
    monkeypatch.setattr(embedding, "_PROJECTED_AT_ONCE", 100)
    assert relative_error(embedding.project(ids, g, projection, num_embeddings=50), whole.double()) <= 1e-6
    nothing = embedding.project(ids[:, :0], g[:, :0], projection, num_embeddings=50)
    assert torch.equal(nothing, torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_project_two_sided(dtype: torch.dtype) -> None:
    ids, g = tokens(3, 20, 9, 12, dtype)
    left, right = randn(4, 9, seed=7), randn(5, 12, seed=8)
    for padding_idx in (None, 0):
        exact = by_autograd(ids, g, 9, padding_idx)
        exact = (left.double() @ exact @ right.double().T).flatten(1)
        result = embedding.project(ids, g, TwoSided(left, right), num_embeddings=9, padding_idx=padding_idx)
        assert relative_error(result, exact) <= 16 * torch.finfo(result.dtype).eps


def test_errors() -> None:
    ids, g = tokens(2, 6, 9, 4)
    options = {"num_embeddings": 9}
    with pytest.raises(ValueError, match=r"ids2 must be in \[0, 9\), got 9"):
        embedding.dots(ids, g, ids.clone().fill_(9), g, **options)
    with pytest.raises(ValueError, match="G1 and G2 must have the same last dimension, got 4 and 3"):
        embedding.dots(ids, g, ids, g[..., :3], **options)
    with pytest.raises(ValueError, match="G1 and G2 must both be float64 or neither"):
        embedding.dots(ids, g, ids, g.double(), **options)
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        embedding.weighted_sum(ids, g, torch.ones(3), **options)
    with pytest.raises(ValueError, match="projection must have dim num_embeddings \\* d = 36, got 35"):
        embedding.project(ids, g, Projection(35, 2), **options)
    with pytest.raises(ValueError, match=r"left must have shape \(k, 9\), got \(2, 8\)"):
        embedding.project(ids, g, TwoSided(torch.ones(2, 8), torch.ones(2, 4)), **options)
    for op, more in (
        ("embedding_dots", (ids, g, 9, -1, True)),
        ("embedding_weighted_sum", (torch.ones(2).double(), 9, -1, True)),
    ):
        with pytest.raises(RuntimeError, match=r"ids must be in \[0, 9\)"):
            getattr(torch.ops.unlearn_kernels, op)(ids + 5, g, *more)
    with pytest.raises(RuntimeError, match="w must be a float64 vector of 2"):
        torch.ops.unlearn_kernels.embedding_weighted_sum(ids, g, torch.ones(2), 9, -1, True)

"""Squared norms of per-sample gradients of an embedding, against autograd in float64."""

import pytest
import torch
from torch import Tensor

from tests.per_sample.embeddings import DTYPES, WIDE, by_autograd, tokens
from unlearn_kernels.per_sample import embedding
from unlearn_kernels.reference.per_sample.embedding import embedding_sqnorms as reference
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn

# (T, V, d): one element; primes; one id only; more ids than 16 bits; more columns and tokens than a task has.
SIZES = [(1, 1, 1), (7, 5, 3), (61, 1, 33), (50, 70001, 9), (1100, 40, 17), (130, 13, 1031)]


def check(ids: Tensor, g: Tensor, rows: int, padding_idx: int | None = None) -> Tensor:
    result = embedding.sqnorms(ids, g, num_embeddings=rows, padding_idx=padding_idx)
    assert result.dtype == WIDE[g.dtype]
    ids = ids.expand(g.shape[:-1])
    exact = by_autograd(ids, g, rows, padding_idx).square().sum(dim=(1, 2))
    padding = -1 if padding_idx is None else padding_idx % rows
    flat = ids.reshape(len(g), -1), g.reshape(len(g), ids[:1].numel(), -1).to(WIDE[g.dtype])
    assert_as_exact_as("norms", result, exact, reference(*flat, rows, padding))
    return result


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_reference_is_autograd(padding_idx: int | None) -> None:
    ids, g = tokens(3, 9, 6, 4, torch.float64)
    exact = by_autograd(ids, g, 6, padding_idx).square().sum(dim=(1, 2))
    torch.testing.assert_close(
        reference(ids, g, 6, -1 if padding_idx is None else 2), exact, rtol=1e-13, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_and_dtypes(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    ids, g = tokens(2, *size, dtype)
    check(ids, g, size[1])
    assert torch.equal(check(ids.int(), g, size[1]), check(ids, g, size[1]))


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_has_no_gradient(padding_idx: int) -> None:
    ids, g = tokens(3, 40, 7, 5)
    check(ids, g, 7, padding_idx)
    only = torch.full((2, 6), padding_idx % 7)
    assert embedding.sqnorms(only, g[:2, :6], num_embeddings=7, padding_idx=padding_idx).eq(0).all()


def test_position_ids_are_those_of_every_sample() -> None:
    g = randn(4, 12, 6)
    positions = torch.arange(12)
    expected = g.double().square().sum(dim=(1, 2))
    for ids in (positions, positions[None], positions.expand(4, 12), torch.arange(20).flip(0)[:12]):
        result = check(ids, g, 20)
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)
    repeated = positions // 3
    assert torch.equal(check(repeated[None], g, 20), check(repeated.repeat(4, 1), g, 20))


def test_dimensions_between_fold_into_tokens() -> None:
    ids, g = torch.arange(24).reshape(2, 3, 4) % 5, randn(2, 3, 4, 6)
    folded = check(ids.flatten(1), g.flatten(1, 2), 5)
    assert torch.equal(check(ids, g, 5), folded)
    assert torch.equal(check(ids[:1], g, 5), check(ids[0], g, 5))
    check(torch.tensor([3, 1]), randn(2, 6), 5)
    check(torch.tensor(3), randn(2, 6), 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype: torch.dtype) -> None:
    ids, g = tokens(3, 40, 9, 20, dtype)
    expected = check(ids, g, 9)
    spread = ids.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(
        embedding.sqnorms(spread, g.transpose(0, 1).contiguous().transpose(0, 1), num_embeddings=9), expected
    )
    assert torch.equal(
        embedding.sqnorms(ids.T.contiguous().T, g.repeat_interleave(2, 1)[:, ::2], num_embeddings=9), expected
    )
    check(ids, g.mT.contiguous().mT, 9)
    check(ids, g[..., :1].expand(-1, -1, 20), 9)
    check(ids, g[:, :1].expand(-1, 40, -1), 9)
    assert torch.equal(check(ids.flip(0), g.flip(0), 9), expected.flip(0))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    result = embedding.sqnorms(torch.zeros(shape[:2], dtype=torch.long), torch.zeros(shape), num_embeddings=5)
    assert torch.equal(result, torch.zeros(shape[0]))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_sample(value: float) -> None:
    ids, g = tokens(3, 33, 9, 20)
    clean = embedding.sqnorms(ids, g, num_embeddings=9)
    g[1, 30, 19] = value
    result = embedding.sqnorms(ids, g, num_embeddings=9)
    assert not result[1].isfinite()
    assert torch.equal(result[::2], clean[::2])


def test_fp16_of_loss_scale_size_is_exact_and_finite() -> None:
    ids, g = tokens(4, 600, 5, 96, torch.float64)
    for scale in (10, 10000):
        half = (scale * g).clamp(-6e4, 6e4).half()
        result = embedding.sqnorms(ids, half, num_embeddings=5)
        exact = by_autograd(ids, half, 5).square().sum(dim=(1, 2))
        assert result.isfinite().all()
        assert ((result - exact) / exact).abs().max() <= 1e-6


def test_many_tokens_of_one_id_keep_their_digits() -> None:
    """A hundred thousand equal terms: a float sum of them one by one would be off by 1e-3."""
    g = torch.full((1, 100_000, 3), 0.1)
    result = embedding.sqnorms(torch.zeros(1, 100_000, dtype=torch.long), g, num_embeddings=1)
    exact = (g[0, 0].double() * 100_000).square().sum()
    assert abs(result.item() / exact.item() - 1) <= 1e-6


def test_same_bits_at_every_thread_count_and_in_every_batch() -> None:
    for size in ((600, 50, 40), (70, 5, 2100)):
        ids, g = tokens(5, *size)

        def norms(part: slice, ids: Tensor = ids, g: Tensor = g, rows: int = size[1]) -> Tensor:
            return embedding.sqnorms(ids[part], g[part], num_embeddings=rows)

        results = at_threads((1, 2, 4, 3), lambda: norms(slice(None)))
        assert all(torch.equal(results[0], other) for other in results)
        assert torch.equal(torch.cat([norms(slice(i, i + 1)) for i in range(5)]), results[0])


def test_order_of_tokens_and_names_of_ids_do_not_matter() -> None:
    ids, g = tokens(3, 50, 30, 8)
    norms = embedding.sqnorms(ids, g, num_embeddings=30)
    order, names = torch.randperm(50), torch.randperm(30)
    torch.testing.assert_close(embedding.sqnorms(ids[:, order], g[:, order], num_embeddings=30), norms)
    torch.testing.assert_close(embedding.sqnorms(names[ids], g, num_embeddings=30), norms)
    assert torch.equal(embedding.sqnorms(ids, 4 * g, num_embeddings=30), 16 * norms)


def test_offsets_beyond_two_to_the_31() -> None:
    """Samples and ids so far apart that their offsets need 64 bits; only the pages that are read come into being."""
    g = torch.empty_strided((2, 3, 4), (2**31 + 8, 4, 1), dtype=torch.float16)
    g[0], g[1] = 2.0, 3.0
    ids = torch.tensor([[0, 2**40, 0], [7, 7, 7]])
    result = embedding.sqnorms(ids, g, num_embeddings=2**40 + 1)
    assert result.tolist() == [4 * (16 + 4), 4 * 81]


def test_peer_parity_and_where_the_peer_errs() -> None:
    """Opacus ghost clipping: the same norms for (B, T) ids, an error for positions (1, T), padding rows counted."""
    opacus = pytest.importorskip("opacus.grad_sample.embedding")
    ids, g = tokens(4, 60, 30, 16)
    layer = torch.nn.Embedding(30, 16, padding_idx=0)
    theirs = opacus.compute_embedding_norm_sample(layer, [ids], g)[layer.weight].square()
    torch.testing.assert_close(embedding.sqnorms(ids, g, num_embeddings=30), theirs, rtol=1e-5, atol=0)
    padded = embedding.sqnorms(ids, g, num_embeddings=30, padding_idx=0)
    torch.testing.assert_close(
        padded.double(), by_autograd(ids, g, 30, 0).square().sum(dim=(1, 2)), rtol=1e-6, atol=0
    )
    assert (theirs > 1.1 * padded).all()
    positions = torch.arange(60)[None] % 30
    with pytest.raises(RuntimeError, match="index_add_"):
        opacus.compute_embedding_norm_sample(layer, [positions], g)
    check(positions, g, 30)


IDS, G = tokens(2, 6, 9, 4)


@pytest.mark.parametrize(
    ("ids", "g", "message"),
    [
        (IDS.float(), G, "ids must be int32 or int64, got torch.float32"),
        (IDS[:, :5], G, r"ids must have the shape of G without its last dimension, \(2, 6\)"),
        (torch.zeros(3, 6, dtype=torch.long), G, "ids must have the shape of G"),
        (IDS, G[0, 0], "G must have at least 2 dimensions"),
        (IDS, G.long(), "G must be a floating-point tensor, got torch.int64"),
        (IDS.to("meta"), G, "ids and G must be on one device, got meta and cpu"),
        (IDS + 4, G, r"ids must be in \[0, 9\), got"),
        (IDS - 9, G, r"ids must be in \[0, 9\), got -"),
    ],
)
def test_errors_name_the_argument(ids: Tensor, g: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embedding.sqnorms(ids, g, num_embeddings=9)


def test_errors_of_numbers() -> None:
    with pytest.raises(ValueError, match=r"padding_idx must be in \[-9, 9\) or None, got 9"):
        embedding.sqnorms(IDS, G, num_embeddings=9, padding_idx=9)
    with pytest.raises(ValueError, match="num_embeddings must not be negative, got -1"):
        embedding.sqnorms(IDS, G, num_embeddings=-1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((IDS, G[0], 9, -1), "must have 2 and 3 dimensions"),
        ((IDS[:1], G, 9, -1), "agree in batch and tokens"),
        ((IDS.short(), G, 9, -1), "ids must be int32 or int64"),
        ((IDS + (1 << 40), G, 9, -1), r"ids must be in \[0, 9\)"),
        ((IDS - 100, G, 9, -1), r"ids must be in \[0, 9\)"),
        ((IDS, G, -3, -1), "num_embeddings must not be negative"),
        ((IDS, G.long(), 9, -1), "must be float32"),
    ],
)
def test_the_raw_operator_guards_memory(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.unlearn_kernels.embedding_sqnorms(*arguments)


def test_takes_no_part_in_autograd_and_compiles() -> None:
    g = G.clone().requires_grad_()
    norms = embedding.sqnorms(IDS, g, num_embeddings=9)
    assert not norms.requires_grad
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda i, g: embedding.sqnorms(i, g, num_embeddings=9) + 1, fullgraph=True, backend="aot_eager"
    )
    for length in (6, 4):
        ids, g = IDS[:, :length], G[:, :length]
        assert torch.equal(compiled(ids, g), embedding.sqnorms(ids, g, num_embeddings=9) + 1)
    torch._dynamo.reset()

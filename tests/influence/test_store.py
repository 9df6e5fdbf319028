"""The store against what was put into it: every format, searches, deletion."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.influence.stores import FORMATS, filled, sharded, stored
from unlearn_kernels._loader import have_C
from unlearn_kernels.influence import GradientStore, _scan, merge
from unlearn_kernels.influence._codes import decode, encode
from unlearn_kernels.influence._found import Found
from unlearn_kernels.testing import at_threads, randn, relative_error

ALL = pytest.mark.parametrize("dtype", FORMATS)


@ALL
@pytest.mark.parametrize("width", [1, 7, 128, 301])
def test_rows_come_back(tmp_path: Path, dtype: str, width: int) -> None:
    rows = randn(250, width)
    store = filled(tmp_path, dtype, rows)
    error = {"float32": 0.0, "bfloat16": 2**-8, "int8": 0.5 / 127, "int4": 0.5 / 7}[dtype]
    back = stored(GradientStore.open(tmp_path / "store"))
    assert (back - rows).abs().max() <= 1.0001 * error * rows.abs().max()
    assert relative_error(store.sqnorms(), rows.double().square().sum(1)) < 1e-12
    assert torch.equal(store.ids(), torch.arange(250))
    store.verify()


@ALL
@pytest.mark.parametrize(("count", "width", "k"), [(1, 300, 3), (7, 33, 300), (200, 128, 10), (5, 1, 300)])
def test_topk_is_that_of_the_decoded_rows(tmp_path: Path, dtype: str, count: int, width: int, k: int) -> None:
    store = filled(tmp_path, dtype, randn(300, width), block=32)
    queries = randn(count, width, seed=1)
    largest, smallest = store.ends(queries, k)
    scores = queries.double() @ stored(store).double().T
    scale = scores.abs().max()
    for found, down in ((largest, True), (smallest, False)):
        exact = scores.sort(1, descending=down).values[:, :k]
        assert (found.values.double() - exact).abs().max() <= 2e-4 * scale
        assert (scores.gather(1, found.indices) - exact).abs().max() <= 2e-4 * scale
        assert torch.equal(found.ids, found.indices)
        single = store.topk(queries, k, largest=down)
        assert all(torch.equal(a, b) for a, b in zip(single, found, strict=True))


@ALL
def test_shards_do_not_matter(tmp_path: Path, dtype: str) -> None:
    """Small whole numbers, many scores of which are equal: the order of the whole in one piece, at any thread count."""
    rows = (torch.arange(400 * 6).reshape(400, 6) % 7 - 3).float()
    queries = torch.tensor([[1.0, 0, 2, 0, 0, 1], [-1, 1, 0, 0, 0, 0]])
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one, many = filled(tmp_path / "a", dtype, rows, 1), filled(tmp_path / "b", dtype, rows, 9)
    for a, b in zip(one.ends(queries, 50), many.ends(queries, 50), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    serial, threads = at_threads((1, 4), lambda: many.ends(queries, 50))
    assert all(
        torch.equal(x, y) for a, b in zip(serial, threads, strict=True) for x, y in zip(a, b, strict=True)
    )
    halves = [one.topk(queries, 50), many.topk(queries, 50)]
    shifted = [halves[0], halves[1]._replace(indices=halves[1].indices + 400)]
    both = merge(shifted, 50)
    assert torch.equal(both.values[:, ::2], both.values[:, 1::2]) or both.values.shape == (2, 50)


@ALL
@pytest.mark.parametrize("ends", [1, 2, 3])
def test_blocks_on_a_device_do_not_matter(
    tmp_path: Path, dtype: str, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows brought a few at a time, as to a device: the bits of a whole shard, ties and deleted rows too."""
    store = filled(tmp_path, dtype, torch.cat([randn(90, 40), randn(90, 40)]), 2)
    store.delete([3, 17, 95])
    queries = randn(12, 40, seed=1)
    queries[3] = 0

    def search() -> list[torch.Tensor]:
        found, _ = store.unscaled(queries, 60, ends, None, None)
        return [x for end in found for x in end]

    def few(
        parts: tuple[torch.Tensor, ...], device: torch.device, kept: None
    ) -> Iterator[tuple[int, list[torch.Tensor]]]:
        for first in range(0, len(parts[0]), 37):
            yield first, [part[first : first + 37] for part in parts]

    whole = search()
    monkeypatch.setattr(_scan, "blocks_on", few)
    assert all(torch.equal(a, b) for a, b in zip(search(), whole, strict=True))
    assert len(whole) == (6 if ends == 3 else 3)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_odd_blocks(dtype: str) -> None:
    """Constant rows, zeros, an odd width, a value too small for a scale: no NaN, no lost column."""
    for width in (1, 5, 33):
        x = torch.stack([torch.full((width,), 3.0), torch.zeros(width), torch.full((width,), -1e-44)])
        back = decode(encode(x, dtype, 4)[0], dtype, width, 4)
        assert torch.equal(back[:2], x[:2])
        assert back[2].abs().max() <= 1e-44
    with pytest.raises(ValueError, match="rows must be finite"):
        encode(torch.tensor([[1.0, torch.nan]]), dtype, 4)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_unbiased_rounding(dtype: str) -> None:
    x = randn(1, 64).repeat(4000, 1)
    mean = decode(encode(x, dtype, 32, first=0)[0], dtype, 64, 32).double().mean(0)
    step = float(x.abs().max()) / (127 if dtype == "int8" else 7)
    assert (mean - x[0]).abs().max() < 5 * 0.5 * step / 4000**0.5
    nearest = decode(encode(x[:1], dtype, 32)[0], dtype, 64, 32)[0]
    assert (nearest - x[0]).abs().max() > 2 * (mean - x[0]).abs().max()


@ALL
def test_scores_self_influence_and_preconditioner(tmp_path: Path, dtype: str) -> None:
    rows, queries = randn(90, 40), randn(3, 40, seed=1)
    matrix = randn(40, 40, seed=2) / 6
    store = filled(tmp_path, dtype, rows)
    kept, steps = stored(store), []
    ids, scores = zip(*store.scores(queries, size=20, progress=lambda *x: steps.append(x)), strict=True)
    assert torch.equal(torch.cat(ids), store.ids())
    assert relative_error(torch.cat(scores, 1), queries.double() @ kept.double().T) < 1e-6
    assert steps[-1] == (90, 90)
    assert relative_error(store.self_influence(), rows.double().square().sum(1)) < 1e-12
    expected = ((kept.double() @ matrix.double()) * kept.double()).sum(1)
    assert relative_error(store.self_influence(matrix), expected) < 1e-5
    folded = store.topk(queries, 7, preconditioner=matrix)
    assert torch.equal(folded.indices, store.topk(queries @ matrix, 7).indices)
    assert torch.equal(folded.indices, store.topk(queries, 7, preconditioner=lambda q: q @ matrix).indices)
    with pytest.raises(ValueError, match="preconditioner must keep the shape"):
        store.topk(queries, 7, preconditioner=lambda q: q[:, 1:])


@ALL
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_self_influence_of_rows_whose_squares_are_no_float32(
    tmp_path: Path, dtype: str, scale: float
) -> None:
    store = filled(tmp_path, dtype, randn(90, 40) * scale)
    kept, matrix = stored(store).double(), randn(40, 40, seed=2) / 6
    for preconditioner in (matrix, matrix.double(), lambda q: q @ matrix):
        expected = ((kept @ matrix.double()) * kept).sum(1)
        assert relative_error(store.self_influence(preconditioner), expected) < 1e-6


@ALL
def test_deletion_and_compaction(tmp_path: Path, dtype: str) -> None:
    rows, queries = randn(120, 24), randn(4, 24, seed=1)
    store = GradientStore.create(tmp_path / "store", 24, dtype)
    for part in range(3):
        ids = torch.arange(40 * part, 40 * part + 40) + 1000
        store.append(rows[40 * part : 40 * part + 40], ids, [{"row": int(i)} for i in ids])
        store.flush()
    reader = GradientStore.open(tmp_path / "store")
    before = reader.topk(queries, 120)
    gone = [1000, 1017, 1039, *range(1040, 1080), 5]
    assert store.delete(gone) == 43
    assert store.delete(gone) == 0
    assert len(store) == 77
    left = torch.tensor([i for i in range(120) if i + 1000 not in gone])
    thinned = store.ends(queries, 77)
    for found in thinned:
        assert torch.equal(found.ids, left[found.indices] + 1000)
        assert torch.equal(found.ids.sort(1).values, (left + 1000).expand(4, -1))
    keep = torch.isin(before.ids, torch.tensor(gone), invert=True)
    assert torch.equal(thinned.largest.ids, before.ids[keep].view(4, 77))
    store.compact()
    assert torch.equal(store.ids(), left + 1000)
    assert store.row_metadata() == [{"row": int(i) + 1000} for i in left]
    again = store.ends(queries, 77)
    assert all(
        torch.equal(a, b) for x, y in zip(thinned, again, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert torch.equal(reader.topk(queries, 120).ids, before.ids)
    reader.refresh()
    assert len(reader) == 77
    store.verify()
    assert store.delete(store.ids()) == 77
    store.compact()
    assert len(store) == 0
    assert store.topk(queries, 0).ids.shape == (4, 0)


def test_ids_of_rows_that_are_gone_are_not_given_again(tmp_path: Path) -> None:
    store = filled(tmp_path, "float32", randn(10, 4))
    store.delete([2, 9])
    store.compact()
    store.append(randn(1, 4))
    store.close()
    with GradientStore.open(tmp_path / "store", write=True) as store:
        store.append(randn(2, 4))
        store.flush()
        assert store.ids().tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 10, 11, 12]


def test_numbers_go_on_from_ids_that_were_given(tmp_path: Path) -> None:
    store = sharded(tmp_path, 2)
    store.append(randn(1, 4), [4])
    store.append(randn(2, 4))
    assert store.delete([4]) == 1
    store.close()
    with GradientStore.open(tmp_path, write=True) as again:
        again.append(randn(1, 4))
        again.flush()
        assert again.ids().tolist() == [0, 1, 5, 6, 7]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("few", [0, 1000])
def test_search_among_many_deleted_rows(
    tmp_path: Path, dtype: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_scan, "_FEW", few)
    rows = torch.cat([randn(40, 33)] * 5)  # with ties
    left = torch.arange(0, 200, 3)
    thinned, plain = (GradientStore.create(tmp_path / name, 33, dtype) for name in ("thinned", "plain"))
    thinned.append(rows)
    thinned.delete(torch.tensor([i for i in range(200) if i % 3]))
    plain.append(rows[left], left)
    plain.flush()
    for count, k in ((1, 5), (20, 67)):
        queries = randn(count, 33, seed=1)
        for ours, expected in zip(thinned.ends(queries, k), plain.ends(queries, k), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    thinned.delete(left)
    assert thinned.topk(randn(2, 33), 0).values.shape == (2, 0)


def test_scores_that_scaling_makes_equal_are_ordered_as_in_one_shard(tmp_path: Path) -> None:
    rows = randn(2000, 16) * 1e-22
    one, many = (GradientStore.create(tmp_path / name, 16, "int8") for name in ("one", "many"))
    one.append(rows)
    one.flush()
    for part in rows.split(500):
        many.append(part)
        many.flush()
    queries = randn(20, 16, seed=1) * 1e-22
    for ours, expected in zip(many.ends(queries, 50), one.ends(queries, 50), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("parts", [1, 3])
def test_scores_in_any_order_are_merged(parts: int) -> None:
    values = randn(2, 12)
    values[:, 7] = values[:, 2]
    numbers = torch.arange(12).expand(2, 12)
    found = merge(
        [Found(*x) for x in zip(*(t.chunk(parts, 1) for t in (values, numbers, numbers)), strict=True)], 5
    )
    best = values.sort(dim=1, descending=True, stable=True)
    assert torch.equal(found.values, best.values[:, :5])
    assert torch.equal(found.ids, best.indices[:, :5])


@pytest.mark.parametrize("width", [1, 32, 33, 300])
@pytest.mark.parametrize("dtype", FORMATS)
def test_few_queries_find_what_many_find(tmp_path: Path, dtype: str, width: int) -> None:
    store = filled(tmp_path, dtype, randn(301, width), block=32)
    queries = randn(20, width, seed=1)
    many = store.topk(queries, 301)
    for count in (1, 3, 4, 8):
        few = store.topk(queries[:count], 301)
        there = many.values[:count].gather(1, many.indices[:count].argsort(1))
        assert relative_error(few.values.gather(1, few.indices.argsort(1)), there) < 1e-6
        if dtype.startswith("int") and have_C:
            assert torch.equal(few.values, many.values[:count])
            assert torch.equal(few.indices, many.indices[:count])


@pytest.mark.skipif(not have_C, reason="needs the compiled extension")
@pytest.mark.parametrize("nibbles", [False, True])
@pytest.mark.parametrize(("width", "block"), [(1, 2), (130, 128), (601, 6), (1100, 128), (1300, 256)])
def test_coded_scores_are_exact(nibbles: bool, width: int, block: int) -> None:
    """Whole numbers and scales of powers of two: to the bit, in tiles of any number of queries, whole blocks or not."""
    blocks, n = -(-width // block), 203
    generator = torch.Generator().manual_seed(width)
    rows = torch.randint(0, 16 if nibbles else 256, (n, width), generator=generator)
    scales = 2.0 ** torch.randint(-1, 3, (n, blocks), generator=generator)
    decoded = (rows - (8 if nibbles else 128)) * scales.double().repeat_interleave(block, 1)[:, :width]
    even = torch.nn.functional.pad(rows, (0, width % 2), value=8)
    coded = (even[:, ::2] | even[:, 1::2] << 4 if nibbles else rows).byte()
    for count in (1, 5, 9, 16, 17, 24, 25, 100, 200):
        codes = torch.randint(-40, 41, (count, width), generator=generator)
        arguments = (codes.short(), torch.ones(count), coded.contiguous(), scales, block)
        values, indices = torch.ops.unlearn_kernels.scan_codes(*arguments, n, nibbles, 3)
        scores = codes.double() @ decoded.T
        for end, down in enumerate((True, False)):
            exact = scores.sort(dim=1, descending=down, stable=True)
            assert torch.equal(values[end].double(), exact.values)
            assert torch.equal(indices[end], exact.indices)


@pytest.mark.skipif(not have_C, reason="needs the compiled extension")
@pytest.mark.parametrize("nibbles", [False, True])
@pytest.mark.parametrize(("width", "block"), [(1, 2), (1152, 128), (1100, 128), (1300, 256), (601, 6)])
def test_few_queries_have_the_scores_of_many(nibbles: bool, width: int, block: int) -> None:
    """To the bit, with any scales and the greatest codes, in any number of rows."""
    blocks, n = -(-width // block), 203
    generator = torch.Generator().manual_seed(width)
    rows = torch.randint(0, 256, (n, (width + 1) // 2 if nibbles else width), generator=generator).byte()
    codes = torch.randint(-8191, 8192, (20, width), generator=generator).short()
    rows[3], rows[4], codes[0], codes[1] = 255, 0, 8191, -8191
    scales = torch.rand(n, blocks, generator=generator)
    scan, ones = torch.ops.unlearn_kernels.scan_codes, torch.ones(20)
    values, indices = scan(codes, ones, rows, scales, block, n, nibbles, 3)
    for begin, end in ((0, 1), (1, 4), (0, 8)):
        few = scan(codes[begin:end], ones[begin:end], rows, scales, block, n, nibbles, 3)
        assert torch.equal(few[0], values[:, begin:end])
        assert torch.equal(few[1], indices[:, begin:end])
    part = scan(codes[:1], ones[:1], rows[:11], scales[:11].contiguous(), block, 11, nibbles, 1)[0]
    assert all(value in values[0, 0] for value in part.flatten())


def test_argument_errors(tmp_path: Path) -> None:
    for arguments, message in (
        ({"width": 0}, "width must be an integer of at least 1, got 0"),
        ({"width": 4.5}, "width must be an integer of at least 1, got 4.5"),
        ({"width": 4, "dtype": "int2"}, "dtype must be one of"),
        ({"width": 4, "block": 3}, "block must be even"),
    ):
        with pytest.raises(ValueError, match=message):
            GradientStore.create(tmp_path / "x", **arguments)
    store = filled(tmp_path, "float32", randn(10, 4))
    with pytest.raises(FileExistsError, match="path must be empty"):
        GradientStore.create(tmp_path / "store", 4)
    for call, message in (
        (lambda: store.append(torch.zeros(2, 5)), r"rows must be \(n, 4\)"),
        (lambda: store.append(torch.zeros(2, 4), torch.arange(3)), "ids must have 2 elements, got 3"),
        (lambda: store.append(torch.zeros(2, 4), metadata=[1]), "metadata must have 2 elements, got 1"),
        (lambda: next(store.scores(torch.zeros(2, 4), size=0)), "size must be at least 1, got 0"),
        (lambda: merge([], 3), "parts must hold at least one result"),
        (lambda: store.topk(torch.zeros(2, 4), 11), "k must be between 0 and 10 rows, got 11"),
        (lambda: store.topk(torch.zeros(4), 1), r"queries must be \(Q, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()

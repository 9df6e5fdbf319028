"""Scans of stored rows on the CPU, in the interpreter."""

import pytest
import torch

from unlearn_kernels.reference import influence as reference
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels import influence, influence_scan
from unlearn_kernels.triton_kernels import influence_scan as kernels

Coded = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def coded(q: int, n: int, d: int, block: int, nibbles: bool) -> Coded:
    """Codes and bytes from end to end; scales are powers of two, so that products round alike with FMA and without."""
    codes = (torch.arange(q * d).view(q, d) * 7919 % 16383 - 8191).to(torch.int16)
    rows = (torch.arange(n * (-(-d // 2) if nibbles else d)).view(n, -1) * 31 % 256).to(torch.uint8)
    scales = 2.0 ** (torch.arange(n * -(-d // block)).view(n, -1) % 3)
    return codes, 2.0 ** (torch.arange(q) % 2), rows, scales


@pytest.mark.parametrize("nibbles", [False, True], ids=["int8", "int4"])
@pytest.mark.parametrize(
    ("q", "n", "d", "block", "k"),
    [(1, 1, 1, 2, 1), (5, 40, 70, 32, 40), (17, 130, 33, 6, 9), (2, 20, 300, 256, 3), (9, 20, 150, 130, 20)],
)
def test_scan_codes(q: int, n: int, d: int, block: int, k: int, nibbles: bool) -> None:
    arguments = coded(q, n, d, block, nibbles)
    expected = reference.scan_codes(*arguments, block, k, nibbles, 3)
    for ends in (1, 2, 3):
        values, indices = kernels.scan_codes(*arguments, block, k, nibbles, ends)
        side = slice(0 if ends & 1 else 1, 2 if ends & 2 else 1)
        assert torch.equal(values, expected[0][side])
        assert torch.equal(indices, expected[1][side])
    if q <= 8:  # which the CPU adds up in lanes
        return
    cpu = torch.ops.unlearn_kernels.scan_codes(*(x.cpu() for x in arguments), block, k, nibbles, 3)
    assert torch.equal(cpu[0], values.cpu())
    assert torch.equal(cpu[1], indices.cpu())


@pytest.mark.parametrize("nibbles", [False, True], ids=["int8", "int4"])
def test_scales_of_any_size(nibbles: bool) -> None:
    codes, _, rows, _ = coded(12, 60, 200, 32, nibbles)
    scales = randn(60, 7, seed=1).abs() * 10.0 ** (torch.arange(7) - 3)
    arguments = (codes, randn(12, seed=2).abs(), rows, scales)
    values, indices = kernels.scan_codes(*arguments, 32, 30, nibbles, 3)
    eager = reference.scan_codes(*arguments, 32, 60, nibbles, 3)
    exact = reference.scan_codes(
        *(x.double() if x.is_floating_point() else x for x in arguments), 32, 60, nibbles, 3
    )
    assert_as_exact_as("values", values, exact[0][..., :30], eager[0][..., :30])
    chosen = exact[0].gather(2, exact[1].argsort(dim=2).gather(2, indices))
    assert_as_exact_as("rows", chosen, exact[0][..., :30], eager[0][..., :30])


def test_the_largest_sums_are_exact() -> None:
    """A block of 256 extremes: 2^28 and more, in which a float's last bit is 32."""
    rows = torch.tensor([[0] * 256, [255] * 256, [0] * 255 + [1]], dtype=torch.uint8)
    codes = torch.tensor([[8191] * 256, [-8191] * 256], dtype=torch.int16)
    found = kernels.scan_codes(codes, torch.ones(2), rows, torch.ones(3, 1), 256, 3, False, 1)
    exact = codes.double() @ (rows.double() - 128).T
    assert torch.equal(found[0][0], exact.float().sort(dim=1, descending=True).values)


def test_pieces_make_up_the_codes() -> None:
    codes = torch.arange(-8191, 8192).to(torch.int16).view(127, 129)
    for nibbles in (False, True):
        pieces = kernels.query_pieces(codes, 20, nibbles).long()
        both = 128 * pieces[::2] + pieces[1::2]
        depth = kernels.Blocks.of(20, nibbles).depth
        columns = both.unflatten(2, (-1, depth))[..., : 10 if nibbles else 20].permute(1, 2, 3, 0)
        assert torch.equal(columns.flatten(1)[:, :129], codes.long())
        assert int(both.abs().sum()) == int(codes.long().abs().sum())


def test_over_several_ranges_and_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "_ranges", lambda q, n: [(b, min(40, n - b)) for b in range(0, n, 40)])
    monkeypatch.setattr(influence, "_QUERIES", 3)
    arguments = coded(7, 101, 20, 8, False)
    expected = reference.scan_codes(*arguments, 8, 50, False, 3)
    for a, b in zip(kernels.scan_codes(*arguments, 8, 50, False, 3), expected, strict=True):
        assert torch.equal(a, b)


def test_equal_scores_by_index_and_layouts() -> None:
    codes, scales, rows, row_scales = coded(3, 20, 16, 8, False)
    rows[:] = rows[0]
    row_scales[:] = 1
    values, indices = kernels.scan_codes(codes, scales, rows, row_scales, 8, 20, False, 3)
    assert torch.equal(indices, torch.arange(20).expand(2, 3, 20))
    transposed = (x.T.contiguous().T for x in (codes, rows, row_scales))
    first, *others = transposed
    again = kernels.scan_codes(first, scales, *others, 8, 20, False, 3)
    assert torch.equal(again[0], values)


def test_nothing_and_mistakes() -> None:
    codes, scales, rows, row_scales = coded(3, 20, 16, 8, False)
    assert kernels.scan_codes(codes[:0], scales[:0], rows, row_scales, 8, 2, False, 3)[0].shape == (2, 0, 2)
    assert kernels.scan_codes(codes, scales, rows, row_scales, 8, 0, False, 1)[1].shape == (1, 3, 0)
    with pytest.raises(ValueError, match="block must be even"):
        influence_scan.scan_codes(codes, scales, rows, row_scales, 7, 2, False, 3)
    with pytest.raises(ValueError, match="ends must be 1, 2 or 3, got 0"):
        influence_scan.scan_codes(codes, scales, rows, row_scales, 8, 2, False, 0)
    with pytest.raises(ValueError, match="k must be at most"):
        influence_scan.scan_codes(codes, scales, rows, row_scales, 8, 21, False, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scan_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "_ranges", lambda q, n: [(b, min(40, n - b)) for b in range(0, n, 40)])
    queries = (torch.arange(6 * 5).view(6, 5) * 7 % 11 - 5).to(dtype)
    rows = (torch.arange(101 * 5).view(101, 5) * 3 % 7 - 3).to(dtype)
    for ends in (1, 2, 3):
        values, indices = influence.scan_rows(queries, rows, 50, ends)
        for n, largest in enumerate([end == 1 for end in (1, 2) if ends & end]):
            expected = reference.topk(queries.double(), rows.double(), 50, largest)
            assert torch.equal(values[n].double(), expected[0])
            assert torch.equal(indices[n], expected[1])

"""Rows as a store keeps them: the kernel against the reference, bit for bit, and the checksum of what is written."""

import zlib
from pathlib import Path

import pytest
import torch

from unlearn_kernels import _files
from unlearn_kernels._backends import FLOATS, REGISTRY
from unlearn_kernels.influence import GradientStore
from unlearn_kernels.influence._codes import decode, encode, squared_norms
from unlearn_kernels.reference import influence_rows as reference
from unlearn_kernels.testing import at_threads, randn

KERNEL = REGISTRY["encode_rows"].impls["cpp"].call
ALL = pytest.mark.parametrize("dtype", FLOATS)


def same(x: torch.Tensor, *settings: int | bool) -> None:
    found, expected = KERNEL(x, *settings), reference.encode_rows(x, *settings)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.float().nan_to_num(-1), b.float().nan_to_num(-1))
    torch.testing.assert_close(found[2], expected[2], rtol=1e-14, atol=0, equal_nan=True)


@ALL
@pytest.mark.parametrize("bits", [0, 4, 8, 16, 32])
@pytest.mark.parametrize(("rows", "width", "block"), [(1, 1, 2), (9, 37, 6), (3, 9001, 128), (50, 300, 256)])
def test_kernel_has_the_bits_of_the_reference(
    rows: int, width: int, block: int, bits: int, dtype: torch.dtype
) -> None:
    x = randn(rows, width, dtype=dtype)
    apart = x.repeat_interleave(2, dim=1)[:, ::2]
    for unbiased in (False, True):
        same(x, bits, block, unbiased, 2**40 + 5, 2**32 - 2)
        same(apart, bits, block, unbiased, 2**40 + 5, 2**32 - 2)
    same(x.T.contiguous().T, bits, block, False, 0, 0)
    same(x[:0], bits, block, False, 0, 0)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("bits", [0, 4, 8, 16, 32])
def test_odd_rows(bits: int, unbiased: bool) -> None:
    """Zeros, magnitudes whose scale is subnormal or nearly so, what is not finite or no float32."""
    x = randn(7, 40, dtype=torch.float64)
    x[0], x[1], x[2] = 0, 1e-38, torch.arange(40) * 1.2e-38
    x[3, 7], x[4, 20], x[5, 3], x[6, 39] = torch.nan, -torch.inf, 3e38, 1e300
    same(x, bits, 16, unbiased, 1, 0)
    same(x.float(), bits, 16, unbiased, 1, 0)


def test_any_thread_count_gives_the_same_bits() -> None:
    x = randn(500, 301)
    one, four = at_threads((1, 4), lambda: KERNEL(x, 4, 32, True, 0, 0))
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))


def test_nearest_is_halves_up() -> None:
    """int8 of magnitude 127, int4 of 7: codes are the numbers themselves, a half goes up, also below zero."""
    for bits, most in ((8, 127.0), (4, 7.0)):
        x = torch.tensor([[most, 2.5, -2.5, 1.49, -1.51, -most, 0.0, 0.5]])
        codes = KERNEL(x, bits, 8, False, 0, 0)[0].int() & 255
        if bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 2).flatten(1)
        assert (codes - int(most) - 1).tolist() == [[int(most), 3, -2, 1, -2, -int(most), 0, 1]]


@pytest.mark.parametrize("bits", [4, 8])
def test_noise_is_uniform_and_of_a_row_and_a_column(bits: int) -> None:
    numbers = reference.noise(torch.arange(400), 500, 3).double()
    assert abs(float(numbers.mean()) / 65536 - 0.5) < 5 / (12 * 400 * 500) ** 0.5
    assert numbers.min() >= 0
    assert numbers.max() < 65536
    x = randn(20, 50)
    whole, part = KERNEL(x, bits, 10, True, 3, 7), KERNEL(x[4:], bits, 10, True, 3, 11)
    assert torch.equal(whole[0][4:], part[0])
    assert not torch.equal(whole[0], KERNEL(x, bits, 10, True, 4, 7)[0])


def test_the_store_does_not_depend_on_how_rows_come(tmp_path: Path) -> None:
    """Random numbers are those of a row's number, whatever it was appended with; also after the store was closed."""
    rows, kept = randn(100, 37), []
    for name, sizes in (("a", [100]), ("b", [1, 30, 69])):
        for part in rows.split(sizes):
            path = tmp_path / name
            store = GradientStore.open(path, write=True) if path.exists() else None
            with store or GradientStore.create(path, 37, "int4", unbiased=True) as writer:
                writer.append(part)
        kept.append(torch.cat([x for _, x in GradientStore.open(tmp_path / name).blocks()]))
    assert torch.equal(*kept)


@ALL
def test_encode_takes_rows_of_any_type(dtype: torch.dtype) -> None:
    x = randn(30, 20, dtype=dtype).T
    for name in ("float32", "bfloat16"):
        coded, sqnorms = encode(x, name, 2)
        assert torch.equal(coded.rows, x.float().to(coded.rows.dtype))
        assert torch.equal(decode(coded, name, 30, 2), coded.rows.float())
        assert torch.equal(sqnorms, squared_norms(x))


def test_rows_that_are_refused_leave_no_shard(tmp_path: Path) -> None:
    rows = torch.ones(3000, 128)
    rows[2900, 5] = torch.nan
    with GradientStore.create(tmp_path / "store", 128, "int8") as store:
        with pytest.raises(ValueError, match="rows must be finite to be stored as int8"):
            store.append(rows)
        store.flush()
        assert len(store) == 0
        store.append(rows[:2000])
    again = GradientStore.open(tmp_path / "store")
    again.verify()
    assert torch.equal(again.ids(), torch.arange(2000))


@pytest.mark.parametrize("size", [0, 1, 15, 63, 64, 65, 79, 80, 127, 128, 1000, 100_003])
def test_checksum_is_that_of_zlib(size: int) -> None:
    content = bytes((i * 2654435761 >> 13) % 256 for i in range(size + 3))
    for begin in (0, 3):
        part = memoryview(content)[begin : begin + size]
        assert _files.crc32(part) == zlib.crc32(part)
        assert _files.crc32(part, 0xDEADBEEF) == zlib.crc32(part, 0xDEADBEEF)

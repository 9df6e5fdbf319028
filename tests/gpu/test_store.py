"""A store searched on the device: rows come in blocks, from several shards, and the answer is the CPU's."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from unlearn_kernels import BackendError, _loader
from unlearn_kernels.influence import GradientStore, _streaming
from unlearn_kernels.influence._codes import Format
from unlearn_kernels.testing import randn

pytestmark = pytest.mark.skipif(not _loader.have_C, reason="the extension is not built")
ALL = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])


def filled(path: Path, dtype: Format, rows: Tensor) -> GradientStore:
    store = GradientStore.create(path / "store", rows.shape[1], dtype)
    for part in rows.tensor_split(3):
        store.append(part)
        store.flush()
    store.delete([5, len(rows) // 2])
    return store


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks, of which memory is used again while others are on their way."""
    monkeypatch.setattr(_streaming, "_BLOCK_BYTES", 100_000)


@ALL
@pytest.mark.parametrize("count", [1, 9, 100])
def test_equals_the_cpu(tmp_path: Path, dtype: Format, count: int, device: str) -> None:
    store = filled(tmp_path, dtype, randn(3001, 301))
    queries = randn(count, 301, seed=1)
    for there, here in zip(store.ends(queries.to(device), 40), store.ends(queries, 40), strict=True):
        assert there.values.device.type == "cpu"
        if dtype.startswith("int") and count > 8:
            assert all(torch.equal(a, b) for a, b in zip(there, here, strict=True))
        torch.testing.assert_close(there.values, here.values, rtol=1e-5, atol=1e-4)


@ALL
def test_equal_scores_and_repeats(tmp_path: Path, dtype: Format, device: str) -> None:
    rows = (torch.arange(3000 * 6).reshape(3000, 6) % 7 - 3).float()
    store = filled(tmp_path, dtype, rows)
    queries = torch.tensor([[1.0, 0, 2, 0, 0, 1], [-1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    first = store.ends(queries.to(device), 700)
    for found, same, here in zip(
        first, store.ends(queries.to(device), 700), store.ends(queries, 700), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))
        torch.testing.assert_close(found.values, here.values, rtol=1e-6, atol=1e-5)
        if not dtype.startswith("int"):  # whole numbers: every sum is exact
            assert torch.equal(found.indices, here.indices)


def test_preconditioners_and_deletion(tmp_path: Path, device: str) -> None:
    store = filled(tmp_path, "int8", randn(500, 40))
    queries, matrix = randn(12, 40, seed=1), torch.eye(40) * 2
    expected = store.topk(queries, 7, preconditioner=matrix)
    for P in (matrix, matrix.to(device), lambda q: 2 * q):
        assert torch.equal(store.topk(queries.to(device), 7, preconditioner=P).ids, expected.ids)
    assert store.delete(expected.ids[0].to(device)) == 7


@ALL
def test_backends(tmp_path: Path, dtype: Format, device: str) -> None:
    store, kernels = filled(tmp_path, dtype, randn(500, 40)), "cpp" if device == "cpu" else "triton"
    queries = randn(12, 40, seed=1).to(device)
    found, asked = store.topk(queries, 7), store.topk(queries, 7, backend=kernels)
    assert all(torch.equal(a, b) for a, b in zip(found, asked, strict=True))
    plain = store.topk(queries, 7, backend="reference")
    torch.testing.assert_close(plain.values, found.values, rtol=1e-5, atol=1e-4)
    for other in {"cpp", "triton"} - {kernels}:
        with pytest.raises(BackendError, match=f"backend '{other}' was requested"):
            store.topk(queries, 7, backend=other)

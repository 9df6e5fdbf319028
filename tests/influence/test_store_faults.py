"""What must not cost rows of a store: odd arguments, a full disk, calls that fail halfway."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.influence.stores import sharded, stored
from unlearn_kernels._files import Growing
from unlearn_kernels.influence import GradientStore, _shards
from unlearn_kernels.influence import store as module
from unlearn_kernels.testing import randn


@pytest.mark.parametrize("value", [np.int64(3), torch.tensor(3), {1, 2}])
def test_metadata_that_is_no_json_is_refused_before_it_costs_rows(tmp_path: Path, value: Any) -> None:
    store = GradientStore.create(tmp_path, 4)
    store.append(randn(5, 4), metadata=[{"n": n} for n in range(5)])
    with pytest.raises(ValueError, match="metadata must be JSON, got element 1: "):
        store.append(randn(2, 4), metadata=[None, {"label": value}])
    store.append(randn(1, 4))
    store.close()
    assert GradientStore.open(tmp_path).row_metadata() == [{"n": n} for n in range(5)] + [None]


def test_metadata_is_what_it_was_when_it_was_given(tmp_path: Path) -> None:
    store, note = GradientStore.create(tmp_path, 4), {"n": 1}
    store.append(randn(1, 4), metadata=[note])
    note["n"] = 2
    store.close()
    assert GradientStore.open(tmp_path).row_metadata() == [{"n": 1}]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_delete_that_fails_takes_nothing_out(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = sharded(tmp_path, 4, 4), []

    def fail(*args: Any) -> Any:
        calls.append(args)
        if len(calls) > failing:
            raise OSError(28, "No space left on device")
        return _shards.with_deleted(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "with_deleted", fail)
        with pytest.raises(OSError, match="No space"):
            store.delete([0, 1, 5])
    assert len(store) == len(store.ids()) == 8
    store.append(randn(1, 4))
    store.close()
    with GradientStore.open(tmp_path, write=True) as again:
        assert again.ids().tolist() == list(range(9))
        assert again.delete([0, 1, 5]) == 3
        assert again.topk(randn(1, 4), 6).ids.sort().values.tolist() == [[2, 3, 4, 6, 7, 8]]


def test_a_compaction_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = sharded(tmp_path, 4, 4)
    store.delete([0, 5])
    before = {child.name for child in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(_shards.Manifest, "write", lambda *_: (_ for _ in ()).throw(OSError("disk")))
        with pytest.raises(OSError, match="disk"):
            store.compact()
    assert {child.name for child in tmp_path.iterdir()} == before
    store.compact()
    store.append(randn(1, 4))
    store.close()
    assert GradientStore.open(tmp_path).ids().tolist() == [1, 2, 3, 4, 6, 7, 8]


@pytest.mark.parametrize("ids", [torch.tensor([False, True]), torch.tensor([1.0, 2.5]), [1.5, 2.0]])
def test_ids_are_integers(tmp_path: Path, ids: Any) -> None:
    store = sharded(tmp_path, 4)
    with pytest.raises(ValueError, match=r"ids must be integers, got torch\.(bool|float32)"):
        store.delete(ids)
    with pytest.raises(ValueError, match=r"ids must be integers, got torch\.(bool|float32)"):
        store.append(randn(2, 4), ids)
    assert store.delete([]) == 0
    assert len(store) == 4


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, file: str) -> Iterator[None]:
    """Files of this name take 100 bytes."""
    whole = Growing.add

    def full(self: Growing, chunk: object) -> None:
        if Path(self._file.name).name != file:
            return whole(self, chunk)
        whole(self, bytes(chunk)[:100])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Growing, "add", full)
        yield


@pytest.mark.parametrize("file", ["rows.bin", "scales.bin"])
def test_rows_that_cannot_be_written_leave_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A disk that is full in the middle of a batch: what came before is whole, what comes after, too."""
    rows = randn(30, 64)
    store = GradientStore.create(tmp_path / "store", 64, "int8")
    store.append(rows[:10])

    with full_disk(monkeypatch, file), pytest.raises(OSError, match="No space left"):
        store.append(rows[10:20])
    store.append(rows[20:])
    store.close()
    store = GradientStore.open(tmp_path / "store")
    store.verify()
    assert torch.equal(store.ids(), torch.arange(20))
    kept = torch.cat([rows[:10], rows[20:]])
    assert (stored(store) - kept).abs().max() <= 1.0001 * 0.5 / 127 * kept.abs().max()


@pytest.mark.parametrize("file", ["ids.bin", "sqnorms.bin", "manifest.json.tmp"])
@pytest.mark.parametrize("go_on", [True, False])
def test_a_flush_that_failed_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, go_on: bool
) -> None:
    rows = randn(30, 64)
    store = GradientStore.create(tmp_path / "store", 64, "float32")
    store.append(rows[:20])
    with full_disk(monkeypatch, file), pytest.raises(OSError, match="No space left"):
        store.flush()
    if go_on:
        store.append(rows[20:])
    store.close()
    store = GradientStore.open(tmp_path / "store")
    store.verify()
    assert torch.equal(stored(store), rows if go_on else rows[:20])
    assert torch.equal(store.ids(), torch.arange(len(store)))

"""What must not cost rows of a store nor find wrong ones: odd arguments, failures halfway, other processes."""

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unlearn_kernels import _files
from unlearn_kernels.influence import GradientStore, StoreError, _scan, _shards, merge
from unlearn_kernels.influence import store as module
from unlearn_kernels.influence._found import Found
from unlearn_kernels.testing import randn


def filled(path: Path, *counts: int, width: int = 4, **options: Any) -> GradientStore:
    store = GradientStore.create(path, width, **options)
    for n, count in enumerate(counts):
        store.append(randn(count, width, seed=n))
        store.flush()
    return store


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


def test_a_writer_that_refreshes_goes_on(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path, 4)
    for count in (3, 2, 4):
        store.append(randn(count, 4))
        store.refresh()
    assert store.ids().tolist() == list(range(9))


def test_other_folders_in_a_store_stay(tmp_path: Path) -> None:
    filled(tmp_path, 3).close()
    for name, file in (("20240101", "notes.txt"), ("00000002", "manifest.json"), ("00000007.tmp", "data")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("mine")
    (tmp_path / "00000001").mkdir()
    with GradientStore.open(tmp_path, write=True) as store:
        store.append(randn(2, 4))
        store.flush()
        store.append(randn(2, 4))
    assert len(GradientStore.open(tmp_path)) == 7
    for name, file in (("20240101", "notes.txt"), ("00000002", "manifest.json"), ("00000007.tmp", "data")):
        assert (tmp_path / name / file).read_text() == "mine"


@pytest.mark.parametrize("failing", [0, 1])
def test_a_delete_that_fails_takes_nothing_out(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = filled(tmp_path, 4, 4), []

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
    store = filled(tmp_path, 4, 4)
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
    store = filled(tmp_path, 4)
    with pytest.raises(ValueError, match=r"ids must be integers, got torch\.(bool|float32)"):
        store.delete(ids)
    with pytest.raises(ValueError, match=r"ids must be integers, got torch\.(bool|float32)"):
        store.append(randn(2, 4), ids)
    assert store.delete([]) == 0
    assert len(store) == 4


def test_numbers_go_on_from_ids_that_were_given(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    store.append(randn(1, 4), [4])
    store.append(randn(2, 4))
    assert store.delete([4]) == 1
    store.close()
    with GradientStore.open(tmp_path, write=True) as again:
        again.append(randn(1, 4))
        again.flush()
        assert again.ids().tolist() == [0, 1, 5, 6, 7]


def test_a_reader_keeps_its_metadata_while_shards_are_compacted(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path, 4)
    store.append(randn(3, 4), metadata=["a", "b", "c"])
    store.flush()
    reader = GradientStore.open(tmp_path)
    store.delete([1])
    store.compact()
    assert reader.row_metadata() == ["a", "b", "c"]
    assert store.row_metadata() == ["a", "c"]


def test_a_file_that_goes_between_two_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(8))
    monkeypatch.setattr(_files, "check_size", lambda path, size: path.unlink())
    with pytest.raises(StoreError, match="is missing"):
        _files.mapped(path, np.dtype("<i8"), (1,))


def test_the_name_of_deleted_rows_is_on_disk_before_the_manifest_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = filled(tmp_path, 4), []
    monkeypatch.setattr(_shards, "sync_folder", lambda folder: synced.append(folder.name))
    store.delete([1])
    assert synced == ["00000000"]


def test_a_creation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.json.tmp").write_text("{")
    (tmp_path / "lock").touch()
    filled(tmp_path, 2).close()
    assert len(GradientStore.open(tmp_path)) == 2
    with pytest.raises(FileExistsError, match="path must be empty"):
        GradientStore.create(tmp_path, 4)


def test_a_forked_process_neither_writes_nor_keeps_writers_away(tmp_path: Path) -> None:
    store = filled(tmp_path, 2)
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(ready[1], b"0" if store.writable else b"1")
        os.read(go[0], 1)
        os._exit(0)
    try:
        assert os.read(ready[0], 1) == b"1"
        assert store.writable
        store.close()
        GradientStore.open(tmp_path, write=True).close()
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)


def test_deleted_rows_that_are_none_are_named(tmp_path: Path) -> None:
    with filled(tmp_path, 4) as store:
        store.delete([1])
    path = tmp_path / "00000000" / "deleted-1.bin"
    path.write_bytes(torch.tensor([9]).numpy().tobytes())
    with pytest.raises(StoreError, match=r"deleted-1\.bin is damaged: it names rows beyond 4"):
        GradientStore.open(tmp_path)


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


def test_a_file_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    filled(tmp_path, 2).close()
    shutil.rmtree(tmp_path / "00000000")
    (tmp_path / "00000000").touch()
    with pytest.raises(StoreError, match="is missing"):
        GradientStore.open(tmp_path)

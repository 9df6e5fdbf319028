"""The files of a store: one writer and many readers, what a killed one leaves behind, damage."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.influence.stores import filled, sharded, stored
from unlearn_kernels import _files
from unlearn_kernels._files import write
from unlearn_kernels.influence import GradientStore, StoreError, _shards
from unlearn_kernels.influence._shards import Manifest
from unlearn_kernels.testing import randn, relative_error


def test_one_writer_many_readers(tmp_path: Path) -> None:
    store = filled(tmp_path, "float32", randn(10, 4))
    with pytest.raises(StoreError, match="open for writing elsewhere"):
        GradientStore.open(tmp_path / "store", write=True)
    reader = GradientStore.open(tmp_path / "store")
    with pytest.raises(StoreError, match="not open for writing"):
        reader.append(randn(1, 4))
    store.append(randn(5, 4, seed=3))
    assert len(GradientStore.open(tmp_path / "store")) == 10
    store.close()
    assert len(reader) == 10
    reader.refresh()
    assert len(reader) == 15
    with GradientStore.open(tmp_path / "store", write=True) as again:
        x = randn(2, 4)
        again.append(x)
        x.zero_()
    assert len(GradientStore.open(tmp_path / "store")) == 17
    assert stored(again)[-2:].abs().max() > 0


def test_a_writer_clears_away_its_own_kind_only(tmp_path: Path) -> None:
    store = filled(tmp_path, "float32", randn(3, 4), parts=1)
    store.close()
    path = store.path
    for name in ("notes", "00000007", "00000008.tmp"):
        (path / name).mkdir()
    GradientStore.open(path, write=True).close()
    assert sorted(x.name for x in path.iterdir() if x.is_dir()) == ["00000000", "notes"]


def test_other_folders_in_a_store_stay(tmp_path: Path) -> None:
    sharded(tmp_path, 3).close()
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


def test_a_writer_that_refreshes_goes_on(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path, 4)
    for count in (3, 2, 4):
        store.append(randn(count, 4))
        store.refresh()
    assert store.ids().tolist() == list(range(9))


def test_a_reader_that_comes_while_shards_are_compacted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(tmp_path, "float32", randn(10, 4))
    before = Manifest.read(store.path)
    store.delete([3])
    store.compact()
    after = Manifest.read(store.path)
    known = iter([before, before, after, after])
    monkeypatch.setattr(Manifest, "read", staticmethod(lambda folder: next(known)))
    assert GradientStore.open(store.path).ids().tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9]


def test_a_reader_keeps_its_metadata_while_shards_are_compacted(tmp_path: Path) -> None:
    store = GradientStore.create(tmp_path, 4)
    store.append(randn(3, 4), metadata=["a", "b", "c"])
    store.flush()
    reader = GradientStore.open(tmp_path)
    store.delete([1])
    store.compact()
    assert reader.row_metadata() == ["a", "b", "c"]
    assert store.row_metadata() == ["a", "c"]


def test_a_forked_process_neither_writes_nor_keeps_writers_away(tmp_path: Path) -> None:
    store = sharded(tmp_path, 2)
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


WRITER = """
    import sys, torch
    from unlearn_kernels.influence import GradientStore
    store = GradientStore.create(sys.argv[1], 64, "int8")
    n = 0
    while True:
        store.append(torch.full((100, 64), float(n + 1)), torch.arange(100 * n, 100 * n + 100))
        store.flush()
        n += 1
        print(n, flush=True)
"""


def test_a_killed_writer_loses_only_what_was_not_flushed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "store")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    flushed = [int(process.stdout.readline()) for _ in range(7)][-1]
    os.kill(process.pid, signal.SIGKILL)
    flushed = max([flushed, *map(int, process.stdout.read().split())])
    process.wait()
    (tmp_path / "store" / "99999999.tmp").mkdir()
    (tmp_path / "store" / "99999998").mkdir()
    with GradientStore.open(tmp_path / "store", write=True) as store:
        assert len(store) in (100 * flushed, 100 * flushed + 100)
        store.verify()
        assert torch.equal(store.ids(), torch.arange(len(store)))
        assert relative_error(stored(store)[:, 0], torch.arange(len(store)) // 100 + 1) < 1e-6
        store.append(torch.ones(1, 64))
    assert not list((tmp_path / "store").glob("9999999*"))
    assert len(GradientStore.open(tmp_path / "store")) % 100 == 1


def test_a_creation_that_was_killed_is_done_again(tmp_path: Path) -> None:
    (tmp_path / "manifest.json.tmp").write_text("{")
    (tmp_path / "lock").touch()
    sharded(tmp_path, 2).close()
    assert len(GradientStore.open(tmp_path)) == 2
    with pytest.raises(FileExistsError, match="path must be empty"):
        GradientStore.create(tmp_path, 4)


def test_large_rows_are_synchronised_in_parts(tmp_path: Path) -> None:
    path, content = tmp_path / "file", bytes(range(256)) * (3 << 17)
    assert write(path, content[: 1 << 26], content[1 << 26 :]) == [len(content), zlib.crc32(content)]
    assert path.read_bytes() == content


def test_the_name_of_deleted_rows_is_on_disk_before_the_manifest_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, synced = sharded(tmp_path, 4), []
    monkeypatch.setattr(_shards, "sync_folder", lambda folder: synced.append(folder.name))
    store.delete([1])
    assert synced == ["00000000"]


def test_damage_is_named(tmp_path: Path) -> None:
    filled(tmp_path, "int8", randn(30, 16)).close()
    folder = tmp_path / "store"
    path = folder / "00000001" / "rows.bin"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"rows.bin is truncated or foreign: 159 bytes, 160 expected"):
        GradientStore.open(folder)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StoreError, match=r"rows.bin is damaged: its checksum is wrong"):
        GradientStore.open(folder).verify()
    path.unlink()
    with pytest.raises(StoreError, match=r"rows.bin is missing"):
        GradientStore.open(folder)
    manifest = folder / "manifest.json"
    record = json.loads(manifest.read_text())
    record["store"]["width"] = 17
    for text, message in (
        (json.dumps(record), "manifest.json is damaged: its checksum is wrong"),
        ("{", "is not the manifest of a gradient store"),
        ('{"store": {"format": "other"}, "crc32": 0}', "format 'other'"),
        ("[]", "is not the manifest of a gradient store"),
    ):
        manifest.write_text(text)
        with pytest.raises(StoreError, match=message):
            GradientStore.open(folder)
    with pytest.raises(StoreError, match=r"is no gradient store: it has no manifest\.json"):
        GradientStore.open(tmp_path)


def test_deleted_rows_that_are_none_are_named(tmp_path: Path) -> None:
    with sharded(tmp_path, 4) as store:
        store.delete([1])
    path = tmp_path / "00000000" / "deleted-1.bin"
    path.write_bytes(torch.tensor([9]).numpy().tobytes())
    with pytest.raises(StoreError, match=r"deleted-1\.bin is damaged: it names rows beyond 4"):
        GradientStore.open(tmp_path)


def test_a_file_in_the_place_of_a_shard_is_named(tmp_path: Path) -> None:
    sharded(tmp_path, 2).close()
    shutil.rmtree(tmp_path / "00000000")
    (tmp_path / "00000000").touch()
    with pytest.raises(StoreError, match="is missing"):
        GradientStore.open(tmp_path)


def test_a_file_that_goes_between_two_looks_at_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(bytes(8))
    monkeypatch.setattr(_files, "check_size", lambda path, size: path.unlink())
    with pytest.raises(StoreError, match="is missing"):
        _files.mapped(path, np.dtype("<i8"), (1,))

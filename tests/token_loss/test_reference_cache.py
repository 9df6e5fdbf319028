"""The cache of a reference: what it gives back, resumption, and files that are damaged or of another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.token_loss.models import Tiny, batches
from unlearn_kernels.token_loss import (
    HiddenRows,
    ReferenceCache,
    StoreError,
    dpo,
    hidden_rows,
    kl_retain,
    linear_nll,
    npo,
    undial,
    wtnpo,
)
from unlearn_kernels.token_loss._cache_files import Manifest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def rows_of(model: nn.Module, batch: dict[str, Any]) -> HiddenRows:
    with torch.no_grad():
        return hidden_rows(model.eval(), batch)


def nll_of(rows: HiddenRows) -> Tensor:
    return linear_nll(rows.h, rows.W, rows.labels, **rows.options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_comes_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = Tiny(dtype)
    data = batches((3, 2, 1))
    built = ReferenceCache.build(tmp_path / "c", model, data, hidden=True)
    assert model.training
    cache = ReferenceCache.open(tmp_path / "c", model)
    cache.verify()
    assert cache.keys() == built.keys() == list(range(10, 16))
    for batch in data:
        rows, keys = rows_of(model, batch), batch["index"].tolist()
        nll = nll_of(rows)
        found = cache.token_nll(keys, rows.labels)
        assert found.dtype == nll.dtype
        assert torch.equal(found, nll)
        torch.testing.assert_close(cache.sequence_nll(keys, rows.labels), nll.double().sum(1))
        h, W, bias = cache.reference(keys, rows.labels)
        counting = rows.labels != -100
        assert torch.equal(h[counting], rows.h[counting])
        assert not h[~counting].any()
        assert torch.equal(W, rows.W)
        assert torch.equal(bias, rows.options["bias"])


def test_losses_take_it(tmp_path: Path) -> None:
    reference, (batch,) = Tiny(), batches((4,))
    cache = ReferenceCache.build(tmp_path, reference, [batch], hidden=True)
    keys = batch["index"].tolist()
    rows, old = hidden_rows(Tiny(tied=True, bias=False).eval(), batch), rows_of(reference, batch)
    r, labels = nll_of(old), rows.labels
    args = rows.h, rows.W, labels
    sums, tokens = cache.sequence_nll(keys, labels), cache.token_nll(keys, labels)
    torch.testing.assert_close(npo(*args, sums), npo(*args, r.sum(1)))
    assert torch.equal(wtnpo(*args, tokens), wtnpo(*args, r))
    pair = rows.h, labels
    torch.testing.assert_close(
        dpo(pair, pair, rows.W, sums, sums), dpo(pair, pair, rows.W, r.sum(1), r.sum(1))
    )
    kept, whole = cache.reference(keys, labels), (old.h, old.W, old.options["bias"])
    assert torch.equal(kl_retain(rows.h, rows.W, kept, labels), kl_retain(rows.h, rows.W, whole, labels))
    assert torch.equal(undial(*args, kept, fixed=True), undial(*args, whole, fixed=True))


def test_divergences_over_prompts_too(tmp_path: Path) -> None:
    reference, (batch,) = Tiny(), batches((4,))
    text = {k: v for k, v in batch.items() if k != "labels"}
    cache = ReferenceCache.build(tmp_path, reference, [text], hidden=True, tokens=False)
    every = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    old, rows = rows_of(reference, text), rows_of(Tiny(tied=True), text)
    kept = cache.reference(batch["index"].tolist(), every)
    expected = kl_retain(rows.h, rows.W, (old.h, old.W, old.options["bias"]), every)
    assert torch.equal(kl_retain(rows.h, rows.W, kept, every), expected)
    with pytest.raises(StoreError, match="keeps sums alone: build it with tokens=True"):
        cache.token_nll([10], every[:1])


def test_padding_may_move(tmp_path: Path) -> None:
    model, (batch,) = Tiny(), batches((3,))
    cache = ReferenceCache.build(tmp_path, model, [batch])
    labels = batch["labels"][:, 1:]
    wider = torch.full((3, 14), -100)
    wider[:, 4:12] = labels
    narrow, wide = cache.token_nll([10, 11, 12], labels), cache.token_nll([10, 11, 12], wider)
    assert torch.equal(wide[:, 4:12], narrow)
    assert torch.equal(cache.token_nll([12, 10], labels[[2, 0]]), narrow[[2, 0]])
    assert cache.token_nll([], labels[:0]).shape == (0, 8)
    assert cache.sequence_nll([]).shape == (0,)


def test_resumption_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Tiny(), batches((2, 3, 2, 3))
    whole = ReferenceCache.build(tmp_path / "whole", model, data, hidden=True)

    class KilledError(Exception):
        pass

    def until(number: int) -> Any:
        yield from data[:number]
        raise KilledError

    monkeypatch.setattr("unlearn_kernels.token_loss.reference_cache._FLUSH_SECONDS", 0.0)
    with pytest.raises(KilledError):
        ReferenceCache.build(tmp_path / "parts", model, until(2), hidden=True)
    # What a writer leaves that is killed while it writes.
    (tmp_path / "parts" / "00000007.tmp").mkdir()
    (tmp_path / "parts" / "00000002").mkdir()
    (tmp_path / "parts" / "manifest.json.tmp").write_text("{")
    runs = []

    def counted(model: nn.Module, batch: Any) -> HiddenRows:
        runs.append(batch["index"].tolist())
        return hidden_rows(model, batch)

    seen: list[int] = []
    parts = ReferenceCache.build(
        tmp_path / "parts", model, data, hidden=True, rows=counted, progress=seen.append
    )
    assert runs == [batch["index"].tolist() for batch in data[2:]]
    assert seen == [5, 5, 7, 10]
    assert parts.keys() == whole.keys()
    for batch in data:
        keys, labels = batch["index"].tolist(), batch["labels"][:, 1:]
        assert torch.equal(parts.sequence_nll(keys), whole.sequence_nll(keys))
        assert torch.equal(parts.token_nll(keys, labels), whole.token_nll(keys, labels))
        assert torch.equal(parts.reference(keys, labels)[0], whole.reference(keys, labels)[0])
    ReferenceCache.open(tmp_path / "parts", model).verify()


def test_killed_while_flushing_keeps_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = Tiny(), batches((2, 3))
    cache = ReferenceCache.create(tmp_path, model)
    for batch in data:
        cache.add(batch["index"].tolist(), rows_of(model, batch))
        if batch is data[0]:
            cache.flush()
    with monkeypatch.context() as patched:
        patched.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            cache.flush()
    assert ReferenceCache.open(tmp_path, model).keys() == [10, 11]


def test_another_model_is_refused(tmp_path: Path) -> None:
    model, data = Tiny(), batches((2,))
    cache = ReferenceCache.build(tmp_path, model, data)
    with torch.no_grad():
        model.mix.weight[0, 0] += 1e-3
    for call in (
        lambda: ReferenceCache.open(tmp_path, model),
        lambda: ReferenceCache.build(tmp_path, model, data),
        lambda: ReferenceCache.open(tmp_path, Tiny(torch.bfloat16)),
    ):
        with pytest.raises(StoreError, match=r"made by another model: .* or build a new cache"):
            call()
    assert ReferenceCache.open(tmp_path, cache.fingerprint).keys() == [10, 11]
    assert ReferenceCache.open(tmp_path, None).keys() == [10, 11]


def test_other_labels_and_missing_samples_are_refused(tmp_path: Path) -> None:
    model, (batch,) = Tiny(), batches((2,))
    cache = ReferenceCache.build(tmp_path, model, [batch])
    labels = batch["labels"][:, 1:].clone()
    labels[1, 4] = (labels[1, 4] + 1) % 50
    with pytest.raises(StoreError, match=r"labels of sample 11 are not those .* \(5 count, 5 did\)"):
        cache.sequence_nll([10, 11], labels)
    with pytest.raises(StoreError, match="labels of sample 10"):
        cache.token_nll([10], torch.full((1, 3), -100))
    with pytest.raises(KeyError, match="has no sample 99; build goes on where it ended"):
        cache.sequence_nll([99])
    with pytest.raises(ValueError, match=r"labels must have shape \(1, T\), got \(2, 8\)"):
        cache.sequence_nll([10], labels)
    with pytest.raises(StoreError, match="has no hidden states: build it with hidden=True"):
        cache.reference([10], labels[:1])
    with pytest.raises(
        StoreError, match=r"keeps tokens=True, hidden=False, asked for were tokens=True, hidden=True"
    ):
        ReferenceCache.build(tmp_path, model, [batch], hidden=True)
    with pytest.raises(ValueError, match="samples' keys under 'index'"):
        ReferenceCache.build(tmp_path, model, [{"input_ids": labels}])
    with pytest.raises(FileExistsError, match="must be empty"):
        ReferenceCache.create(tmp_path, model)


def changed(batch: dict[str, Any], name: str, row: int, column: int) -> dict[str, Any]:
    values = batch[name].clone()
    values[row, column] = (values[row, column] + 1) % 50
    return batch | {name: values}


@pytest.mark.parametrize(("name", "column"), [("input_ids", 0), ("labels", 4)])
def test_a_key_that_comes_to_mean_another_text_is_refused(tmp_path: Path, name: str, column: int) -> None:
    model, (batch,) = Tiny(), batches((2,))
    ReferenceCache.build(tmp_path / "a", model, [batch])
    other, message = (
        changed(batch, name, 1, column),
        "sample 11 was made of other tokens or labels: build a new",
    )
    for again in ([other], [batch | {"index": torch.tensor([10, 12])}, other]):
        with pytest.raises(StoreError, match=message):  # skipped; together with a new sample
            ReferenceCache.build(tmp_path / "a", model, again)
    assert ReferenceCache.open(tmp_path / "a", model).keys() == [10, 11, 12]
    with pytest.raises(StoreError, match=message):  # within one build
        ReferenceCache.build(tmp_path / "b", model, [batch, other])
    with pytest.raises(StoreError, match="sample 7 was made of other tokens or labels"):
        ReferenceCache.build(tmp_path / "c", model, [batch | {"index": [7, 7]}])
    built = ReferenceCache.build(tmp_path / "c", model, [{k: v[:1] for k, v in batch.items()}] * 2)
    assert built.keys() == [7, 10]


@pytest.mark.parametrize("masked", [True, False])
def test_other_padding_is_the_same_text(tmp_path: Path, masked: bool) -> None:
    model, (batch,) = Tiny(), batches((3,))
    batch = batch if masked else {k: v for k, v in batch.items() if k != "attention_mask"}
    ReferenceCache.build(tmp_path, model, [batch])
    fill = {"input_ids": 3, "labels": -100, "attention_mask": 0}
    wider = {k: nn.functional.pad(v, (0, 2), value=fill[k]) for k, v in batch.items() if k in fill}
    wider["input_ids"][1, 8] = 5  # padding: the second text is one token shorter
    assert ReferenceCache.build(tmp_path, model, [wider | {"index": batch["index"]}]).keys() == [10, 11, 12]


def test_caches_of_an_earlier_commit_are_read(tmp_path: Path) -> None:
    model, (batch,) = Tiny(), batches((2,))
    ReferenceCache.build(tmp_path, model, [batch])
    manifest = Manifest.read(tmp_path)
    del manifest.shards[0].files["inputs.bin"]
    (tmp_path / "00000000" / "inputs.bin").unlink()
    manifest.write(tmp_path)
    other = changed(batch, "input_ids", 0, 0)
    cache = ReferenceCache.build(tmp_path, model, [other | {"index": batch["index"]}])
    cache.verify()
    with pytest.raises(StoreError, match="sample 11 was made of other"):  # labels are known
        ReferenceCache.build(tmp_path, model, [changed(batch, "labels", 1, 4) | {"index": [3, 11]}])


def test_keys_of_numpy_and_tensors(tmp_path: Path) -> None:
    model, (batch,) = Tiny(), batches((2,))
    labels = batch["labels"][:, 1:]
    with ReferenceCache.create(tmp_path / "a", model) as cache:
        cache.add(np.array([10, 11]), rows_of(model, batch), batch)
    listed = [batch | {"index": [np.int64(10), torch.tensor(11)]}]
    for cache in (
        ReferenceCache.open(tmp_path / "a", model),
        ReferenceCache.build(tmp_path / "b", model, [batch], hidden=True),
        ReferenceCache.build(tmp_path / "c", model, listed),
    ):
        expected = cache.sequence_nll([10, 11])
        for keys in (batch["index"], list(batch["index"]), np.array([10, 11]), [np.int64(10), np.int32(11)]):
            assert torch.equal(cache.sequence_nll(keys, labels), expected)
            assert cache.token_nll(keys, labels).shape == labels.shape
        assert torch.tensor(10) in cache
        assert np.int64(12) not in cache
        assert cache.keys() == [10, 11]
        with pytest.raises(ValueError, match="keys must be integers or strings, got float"):
            cache.sequence_nll([10.0])
    assert ReferenceCache.open(tmp_path / "b", None).reference(batch["index"], labels)[0].shape == (2, 8, 16)
    calls: list[Any] = []
    with pytest.raises(ValueError, match="keys must be integers or strings, got tuple"):
        ReferenceCache.build(tmp_path / "d", model, [batch | {"index": [(1, 2), (1, 3)]}], rows=calls.append)
    assert calls == []


def test_modes_of_modules_come_back(tmp_path: Path) -> None:
    model = Tiny().train()
    model.mix.eval()
    ReferenceCache.build(tmp_path, model, batches((2,)))
    assert [m.training for m in (model, model.mix, model.dropout)] == [True, False, True]


def test_writers_are_kept_apart_and_types_are_fixed(tmp_path: Path) -> None:
    model, (batch,) = Tiny(), batches((2,))
    with ReferenceCache.create(tmp_path, model) as cache:
        with pytest.raises(StoreError, match="open for writing elsewhere"):
            ReferenceCache.open(tmp_path, model, write=True)
        cache.add(["a", "b"], rows_of(model, batch))
        assert "a" in cache
        assert len(cache) == 2
        with pytest.raises(StoreError, match=r"keeps likelihoods of float32.*got float64"):
            cache.add(["c", "d"], rows_of(Tiny(torch.float64), batch))
        with pytest.raises(ValueError, match="keys must be one a sequence, 2, got 1"):
            cache.add(["c"], rows_of(model, batch))
        assert cache.sequence_nll(["b"]).shape == (1,)  # not flushed yet
    with pytest.raises(StoreError, match="not open for writing"):
        cache.add(["c", "d"], rows_of(model, batch))
    assert ReferenceCache.open(tmp_path, model).keys() == ["a", "b"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    model, data = Tiny(), batches((2,))
    made = tmp_path / "made"
    ReferenceCache.build(made, model, data, hidden=True)

    def copy() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(made, tmp_path / "copy"))

    folder = copy()
    (folder / "00000000" / "nll.bin").write_bytes(b"123")
    with pytest.raises(StoreError, match=r"nll\.bin is truncated or foreign: 3 bytes, 48 expected"):
        ReferenceCache.open(folder, model)
    folder = copy()
    (folder / "00000000" / "hidden.bin").unlink()
    with pytest.raises(StoreError, match=r"hidden\.bin is missing"):
        ReferenceCache.open(folder, model)
    for name in ("00000000/hidden.bin", "head/weight.bin"):
        folder = copy()
        content = bytearray((folder / name).read_bytes())
        content[5] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(StoreError, match=r"is damaged: its checksum is wrong"):
            ReferenceCache.open(folder, model).verify()
    folder = copy()
    manifest = json.loads((folder / "manifest.json").read_text())
    for change, message in (
        ({"format": "other"}, "is not the manifest of a reference cache: format 'other'"),
        ({"version": 9}, "has version 9, this package reads 1"),
        ({"fingerprint": "0"}, "is damaged: its checksum is wrong"),
    ):
        changed = manifest | {"store": manifest["store"] | change}
        (folder / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(StoreError, match=message):
            ReferenceCache.open(folder, model)
    with pytest.raises(StoreError, match=r"is no reference cache: it has no manifest\.json"):
        ReferenceCache.open(tmp_path, model)

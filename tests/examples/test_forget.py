"""`examples/forget_a_module.py`: its corpus, its two sets of operators, and a smoke run from end to end."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("tokenizers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    for name in ("corpus", "operators", "training"):
        importlib.import_module(f"forget.{name}")
    return sys.modules["forget"]


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A library of two modules, with a duplicate, a text that is too short, and a folder of tests."""
    files = {
        "b.py": '"""The second module of two."""\ndef f():\n    """Shared by both of them."""\n',
        "a/__init__.py": '"""The first module of two."""\nclass C:\n    """Shared by both of them."""\n',
        "a/part.py": '"""Too short."""\nasync def g():\n    """Found in a nested file."""\n',
        "a/tests/test_a.py": '"""Tests are no documentation here."""\n',
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def test_corpus_is_ordered_and_distinct(forget: ModuleType, library: Path) -> None:
    texts = forget.corpus.collect(library)
    assert [(text.module, text.content) for text in texts] == [
        ("a", "The first module of two."),
        ("a", "Shared by both of them."),
        ("a", "Found in a nested file."),
        ("b", "The second module of two."),
    ]
    assert texts == forget.corpus.collect(library)


def test_tokenizer_is_deterministic(forget: ModuleType) -> None:
    texts = [f"def f{i}(x): return the {i % 7}th of {i} values" for i in range(200)]
    first, second = (forget.corpus.train_tokenizer(texts, 400) for _ in range(2))
    assert first.to_str() == second.to_str()
    (sequence,) = forget.corpus.encode(first, [texts[3]], 64)
    assert sequence[0] == sequence[-1] == 0
    assert first.decode(sequence[1:-1].tolist()) == texts[3]


def test_split_holds_out_and_depends_on_the_seed_alone(forget: ModuleType) -> None:
    texts = [forget.corpus.Text("big" if i % 3 else "other", f"text {i}") for i in range(300)]
    split = forget.corpus.split(texts, "big", seed=1)
    parts = [split.forget, split.queries, split.retain, split.validation]
    assert sorted(i for part in parts for i in part) == list(range(300))
    assert all(texts[i].module == "big" for i in split.forget + split.queries)
    assert all(texts[i].module == "other" for i in split.retain + split.validation)
    assert split == forget.corpus.split(texts, "big", seed=1) != forget.corpus.split(texts, "big", seed=2)


def test_unknown_module_names_the_largest(forget: ModuleType) -> None:
    texts = [forget.corpus.Text("big", f"text {i}") for i in range(100)]
    with pytest.raises(ValueError, match=r"'none' has 0 docstrings.*big \(100\)"):
        forget.corpus.split(texts, "none", seed=0)


def test_batches_cover_every_text_within_the_budget(forget: ModuleType) -> None:
    lengths = torch.randint(2, 60, (101,), generator=torch.Generator().manual_seed(0)).tolist()
    for generator in (None, torch.Generator().manual_seed(0)):
        batches = forget.training.batches_by_length(lengths, 256, generator)
        assert sorted(i for batch in batches for i in batch) == list(range(101))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 256 for batch in batches)


def test_kernels_and_plain_operators_agree(forget: ModuleType) -> None:
    torch.manual_seed(0)
    kernels, plain = forget.operators.Kernels(), forget.operators.Plain()
    gradients, rows = torch.randn(5, 300), torch.randn(40, 16)
    project = [o.projection(300, 64, 3, gradients)(gradients) for o in (kernels, plain)]
    torch.testing.assert_close(*project)
    assert torch.equal(*(o.topk(rows[:2], rows, 7) for o in (kernels, plain)))

    hidden, head, labels = torch.randn(3, 9, 16), torch.randn(50, 16), torch.randint(0, 50, (3, 9))
    labels[0, 4:] = -100
    torch.testing.assert_close(*(o.token_nll(hidden, head, labels) for o in (kernels, plain)))
    reference = torch.tensor([20.0, 40.0, 30.0])
    torch.testing.assert_close(*(o.npo(hidden, head, labels, reference, 0.1) for o in (kernels, plain)))

    inputs, outputs = (
        [torch.randn(3, 9, 16), torch.randn(3, 9, 8)],
        [torch.randn(3, 9, 4), torch.randn(3, 9, 5)],
    )
    clipped = [o.clip(inputs, outputs, 30.0) for o in (kernels, plain)]
    assert 0 < (clipped[1].norms > 30.0).sum() < 3
    torch.testing.assert_close(*(c.gradients for c in clipped))
    torch.testing.assert_close(*(c.norms for c in clipped))


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_kernels_and_plain_surgery_agree(forget: ModuleType, sign: float) -> None:
    torch.manual_seed(0)
    retain = [torch.randn(7, 5), torch.randn(11)]
    toward = [sign * r + torch.randn_like(r) for r in retain]
    merged = [
        o.merge([f.clone() for f in toward], [r.clone() for r in retain], 0.5)
        for o in (forget.operators.Kernels(), forget.operators.Plain())
    ]
    torch.testing.assert_close(*(gradients for gradients, _ in merged))
    assert merged[0][1] == pytest.approx(merged[1][1], abs=1e-6)
    assert math.copysign(1.0, merged[1][1]) == sign


@pytest.mark.slow
def test_quick_run_writes_its_report(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "forget_a_module.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert "precision at 50" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["module"] == "turtle"
    assert not report["training"]["reused"]
    assert set(report["runs"]) == {"kernels", "plain"}
    for run in report["runs"].values():
        assert len(run["steps"]) == report["unlearning"]["steps"]
        assert set(run["nll"]["after"]) == {"forget", "queries", "retain", "validation"}
        assert all(math.isfinite(value) for when in run["nll"].values() for value in when.values())
        assert 0 <= run["influence"]["precision_at_50"] <= 1
        assert run["seconds"]["total"] > 0
        assert set(run["peak_extra_bytes"]) == {"influence", "unlearning"}
    assert {check["what"] for check in report["checks"] if check["met"] not in (True, False)} == set()
    noise = report["deviation"]
    for field in ("npo_relative", "retain_nll_relative", "weights_relative"):
        assert noise["kernels_to_plain"][field] <= 10 * noise["plain_to_float64"][field] + 1e-6


@pytest.mark.slow
def test_memory_falls_with_the_vocabulary(tmp_path: Path) -> None:
    script = str(EXAMPLES / "forget_a_module.py")
    command = [sys.executable, script, "--memory-over-vocabulary", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert "plain / kernels" in done.stdout
    points = json.loads((tmp_path / "memory.json").read_text())["points"]
    assert [p["vocabulary"] for p in points] == [2048, 32_768]
    assert all(p["logits"] == 4 * 4 * 64 * p["vocabulary"] for p in points)
    if Path("/proc/self/clear_refs").exists():
        assert points[1]["plain"] > 2 * points[1]["logits"]
        assert points[1]["kernels"] < 0.5 * points[1]["plain"]


@pytest.mark.slow
def test_unknown_module_ends_with_a_sentence(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "forget_a_module.py"),
        "--module",
        "no_such",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'no_such' has 0 docstrings" in done.stderr
    assert "Traceback" not in done.stderr

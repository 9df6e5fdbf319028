"""`examples/forget_a_concept.py`: its pictures, and a smoke run from end to end."""

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

pytest.importorskip("diffusers")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("concepts.drawing")


def test_pictures_depend_on_the_seed_and_show_what_they_are_told(drawing: ModuleType) -> None:
    shapes, colours = drawing.every_prompt(3)
    first, again = (drawing.draw(shapes, colours, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first.pictures, again.pictures)
    assert first.pictures.shape == (len(shapes), 3, drawing.SIZE, drawing.SIZE)
    assert -1 <= first.pictures.min() < first.pictures.max() <= 1
    tints = torch.tensor(list(drawing.COLOURS.values()))
    assert torch.equal(first.pictures.amax((2, 3)).argmax(1), tints[colours].argmax(1))
    lit = [(first.pictures.amax(1)[shapes == i] > 0).float().mean() for i in range(len(drawing.SHAPES))]
    size = dict(zip(drawing.SHAPES, lit, strict=True))
    assert size["circle"] > size["ring"]
    assert size["square"] > size["triangle"] > size["bar"]
    assert first.words[:, 1].min() == len(drawing.COLOURS)
    assert set(drawing.draw_random(20, torch.Generator().manual_seed(0), of=[2]).shapes.tolist()) == {2}


@pytest.mark.slow
def test_quick_run_writes_its_report(tmp_path: Path) -> None:
    options = ["--quick", "--target", "ring", "--out", str(tmp_path)]
    command = [sys.executable, str(EXAMPLES / "forget_a_concept.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr
    assert "ring (forgotten)" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    ways = set(report["steps"])
    assert "doco" in ways
    assert set(report["drawn"]) == {"before", *ways}
    for drawn in report["drawn"].values():
        assert len(drawn["shapes"]) == 6
        assert all(0 <= drawn[name] <= 1 for name in ("target", "others", "colour"))
        assert math.isfinite(drawn["retain_loss"])
    first = [next(step for step in report["steps"][way] if "forget" in step) for way in ways]
    assert all(
        step == pytest.approx(first[0], rel=1e-6) for step in first
    )  # the ways part after the first step
    assert report["drawn"]["doco"]["retain_loss"] != report["drawn"]["before"]["retain_loss"]


def test_one_shape_twice_ends_with_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("forget_a_concept")
    monkeypatch.setattr(sys, "argv", ["forget_a_concept.py", "--target", "ring", "--anchor", "ring"])
    assert example.main() == 2
    assert "target and anchor must differ, got 'ring' twice" in capsys.readouterr().err

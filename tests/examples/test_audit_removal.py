"""`examples/audit_removal.py`: its model against torch and scikit-learn, and what the audit must show."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.func import grad, hessian

from unlearn_kernels.testing import relative_error

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("audit_removal")


@pytest.mark.parametrize("name", ["digits", "breast_cancer"])
def test_model_is_at_the_optimum_of_what_it_differentiates(example: ModuleType, name: str) -> None:
    x, y, *test = example.load(name, 0)
    few = slice(0, 120)
    model = example.Logistic(x[few, -12:], y[few] % 4, test[0][:, -12:], test[1] % 4, 0.7)
    rows = torch.arange(120)

    def objective(w: torch.Tensor) -> torch.Tensor:
        logits = model.x @ w.T
        if model.classes == 2:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        return torch.nn.functional.cross_entropy(logits, model.y, reduction="sum") + 0.35 * w.square().sum()

    assert grad(objective)(model.w).norm() < 1e-8
    w = model.w + 0.1
    assert relative_error(model.gradient(w, rows), grad(objective)(w).flatten()) < 1e-12
    size = w.numel()
    assert relative_error(model.hessian(w, rows), hessian(objective)(w).reshape(size, size)) < 1e-12


def test_newton_comes_near_retraining_and_the_copied_recursion_does_not(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit.json"
    monkeypatch.setattr(sys, "argv", ["audit_removal.py", "--data", "breast_cancer", "--out", str(out)])
    default = torch.get_default_dtype()
    try:
        assert example.main() == 0
    finally:
        torch.set_default_dtype(default)
    found = json.loads(out.read_text())
    assert "woodfisher as copied" in capsys.readouterr().out
    for which in example.REMOVALS:
        by = {row["step"]: row for row in found if row["removed"] == which}
        error = {step: row["error"] for step, row in by.items()}
        assert error["nothing"] == 1
        assert error["newton"] < error["influence function"] < error["ekfac"] < 1
        assert 0.95 < error["woodfisher as copied"] < 1
        assert by["newton"]["best_length_error"] < 0.3 < 0.7 < by["woodfisher as copied"]["best_length_error"]
        assert by["newton"]["gradient_left"] < by["woodfisher as copied"]["gradient_left"]
        assert (
            max(by[s]["residual"] for s in ("newton", "fisher", "ekfac")) < 1e-10 < by["datainf"]["residual"]
        )
        assert by["newton"]["test_deviation"] < by["nothing"]["test_deviation"]
        assert by["newton"]["forget_loss"] > by["nothing"]["forget_loss"]
    quick = {row["step"]: row for row in found if row["removed"] == "random"}
    assert quick["newton"]["error"] < 0.05

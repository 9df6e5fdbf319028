"""`python -m unlearn_kernels`: the report, the self-check, and the environment variables that it lists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from unlearn_kernels import _diagnose, _env, _report, _selfcheck
from unlearn_kernels._backends import BACKENDS, REGISTRY, Impl
from unlearn_kernels._samples import SAMPLES

ROOT = Path(__file__).parents[2]


def diagnose(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unlearn_kernels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)


def test_json_report_is_complete_and_healthy() -> None:
    run = diagnose("--json", UNLEARN_KERNELS_ISA="baseline")
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["extensions"]["_C"] == "loaded"
    assert report["cpu"]["isa used"] == "baseline"
    assert report["environment"]["UNLEARN_KERNELS_ISA"] == {
        "value": "baseline",
        "set": True,
        "default": "auto",
    }
    assert report["operators"].keys() == report["self_check"].keys() == REGISTRY.keys()
    for name, cells in report["operators"].items():
        assert cells.keys() == set(BACKENDS)
        assert cells["cpp"]["problem"] is None
        assert report["self_check"][name]["cpp"] == _selfcheck.PASSED


def test_text_report_names_every_operator_and_variable() -> None:
    text = _report.render(_diagnose.collect())
    for word in (*REGISTRY, *_env.VARIABLES, *BACKENDS):
        assert word in text
    assert max(map(len, text.splitlines())) < 250


def test_self_check_sees_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "linear_sqnorms"
    right = REGISTRY[name].impls["cpp"]
    wrong = Impl("cpp", lambda *arguments: right.call(*arguments) * (1 + 1e-4), ("cpu",))
    monkeypatch.setitem(REGISTRY[name].impls, "cpp", wrong)
    outcome = _selfcheck.run()[name]["cpp"]
    assert outcome.startswith("AssertionError")
    report = _diagnose.collect()
    assert not _diagnose.healthy(report)
    assert "FAILED" in _report.render(report)


def test_every_operator_has_a_sample() -> None:
    assert SAMPLES.keys() == REGISTRY.keys()


def test_gpu_path_is_called_not_run_until_a_result_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "device": "cuda",
        "role": "ours",
        "status": "ok",
        "provider": "unlearn_kernels",
        "ops": ["linear_sqnorms"],
    }
    row |= {"machine": "Some GPU", "date": "2026-01-02T03:04Z", "commit": "0123456789ab"}
    other = [row | {"status": "WRONG", "ops": ["gramian"]}, row | {"device": "cpu", "ops": ["topk"]}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"rows": [row, *other]}))
    monkeypatch.setattr(_diagnose, "_result_files", lambda: [])
    assert _diagnose.operators()["linear_sqnorms"]["triton"]["hardware"] == _diagnose.NEVER_RUN
    monkeypatch.setattr(_diagnose, "_result_files", lambda: [path])
    assert _diagnose.gpu_runs() == {("linear_sqnorms", "triton"): "Some GPU, 2026-01-02, 0123456"}


def sources() -> list[Path]:
    folders = [ROOT / name for name in ("csrc", "unlearn_kernels", "python", "benchmarks", "examples")]
    found = [p for f in folders for p in f.rglob("*") if p.suffix in {".py", ".cpp", ".h", ".inc", ".cu"}]
    return [*found, ROOT / "setup.py", ROOT / "Makefile"]


def test_environment_variables_are_declared_and_documented() -> None:
    used = {
        name for path in sources() for name in re.findall(r"UNLEARN_KERNELS_[A-Z][A-Z_]*", path.read_text())
    }
    readme = (ROOT / "README.md").read_text()
    assert used == _env.VARIABLES.keys()
    for name, variable in _env.VARIABLES.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        assert all(f"`{option}`" in row for option in variable.options.split(", "))

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import FAILED, LATE, PASSED, SKIPPED, Outcome, Step


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    return tmp_path


def step(name: str, code: str) -> Step:
    return Step(name, (sys.executable, "-c", code))


def test_a_step_is_told_by_its_status_and_its_last_line(logs: Path) -> None:
    passed = gpu.run(step("good", "print('one'); print('two'); print()"), 60)
    assert (passed.status, passed.note) == (PASSED, "two")
    assert (logs / "good.log").read_text() == "one\ntwo\n\n"
    assert gpu.run(step("bad", "print('no'); raise SystemExit(3)"), 60).status == FAILED


def test_a_step_that_cannot_run_or_has_no_time_says_so() -> None:
    assert gpu.run(Step("tool", ("nothing",), missing="no tool here"), 60) == Outcome(
        SKIPPED, note="no tool here"
    )
    assert gpu.run(step("late", "print(1)"), 0) == Outcome(LATE)
    slow = gpu.run(step("slow", "import signal, time; signal.signal(2, signal.SIG_DFL); time.sleep(60)"), 1)
    assert slow.status == LATE
    assert slow.seconds < 30


def test_steps_go_on_after_a_failure_and_resume_where_it_was(logs: Path) -> None:
    first = [step("a", "print('a')"), step("b", "raise SystemExit(1)"), step("c", "print('c')")]
    outcomes = gpu.run_all(first, {}, 60)
    assert [o.status for o in outcomes.values()] == [PASSED, FAILED, PASSED]
    again = [step("a", "raise SystemExit(1)"), step("b", "print('b')"), step("c", "raise SystemExit(1)")]
    outcomes = gpu.run_all(again, gpu._before(), 60)
    assert {name: o.note for name, o in outcomes.items()} == {"a": "a", "b": "b", "c": "c"}


def test_a_step_ends_by_its_own_limit_and_is_told_how_long_it_has() -> None:
    waiting = "import signal, time; signal.signal(2, signal.SIG_DFL); time.sleep(60)"
    assert gpu.run(Step("slow", (sys.executable, "-c", waiting), most=1), 50).status == LATE
    told = Step("told", (sys.executable, "-c", "import sys; print(sys.argv[1])", "{left}"))
    assert gpu.run(told, 60).note == "40"


def test_each_family_and_the_dry_run_resume_by_themselves() -> None:
    gpu.run_all([step("a", "print('a')")], {}, 60, "dry surgery")
    gpu.run_all([step("a", "raise SystemExit(1)")], {}, 60, "nvidia-h200 surgery")
    assert gpu._before("dry surgery")["a"].status == PASSED
    assert gpu._before("nvidia-h200 surgery")["a"].status == FAILED
    assert gpu._before("nvidia-h200 influence") == {}


def test_results_of_another_commit_are_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = tmp_path / "nvidia-h200.json"

    def stays(of: str, here: str | None, resume: bool) -> bool:
        results.write_text(json.dumps({"run": {"commit": of}}))
        monkeypatch.setattr(gpu.machine, "commit", lambda: here)
        moved = gpu.set_aside(results, resume)
        assert (moved is None) == results.exists()
        assert moved is None or json.loads(moved.read_text())["run"]["commit"] == of
        return results.exists()

    assert stays("abc", "abc", False)
    assert not stays("abc", "def", True)
    assert stays("abc+", "abc+", True)
    assert not stays("abc+", "abc+", False)
    assert not stays("abc", None, True)
    results.unlink(missing_ok=True)
    assert gpu.set_aside(results, False) is None


@pytest.mark.parametrize("family", ["surgery", "influence"])
def test_a_family_has_its_tests(family: str) -> None:
    """`-k surgery` finds the tests of gramian, and not those of topk."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", "-k", family, "tests/gpu"]
    told = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True).stdout
    mine = {
        "surgery": "-gramian-triton]",
        "influence": "-topk-triton]",
        "per_sample": "-norm_grads-triton]",
        "token_loss": "-linear_kl-triton]",
    }
    assert [name for name, test in mine.items() if test in told] == [family]


def test_another_commit_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.run_all([step("a", "print('a')")], {}, 60)
    monkeypatch.setattr(gpu.machine, "commit", lambda: "another")
    assert gpu._before() == {}


def test_the_summary_has_a_line_a_step() -> None:
    text = gpu.summary({"build": Outcome(PASSED, 12.3, "done"), "tests": Outcome(FAILED, 4, "1 failed")})
    assert text.splitlines() == [
        "build  passed           12 s  done",
        "tests  FAILED            4 s  1 failed",
    ]


@pytest.mark.skipif(gpu.torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_device_it_says_what_can_be_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_every_command_of_a_run_exists(tmp_path: Path) -> None:
    """Each step's module and files are there: a typing error must not cost a lease."""
    for chosen in gpu.steps(["surgery"], tmp_path / "results.json"):
        for word in chosen.command:
            assert not word.startswith("tests/") or (gpu.ROOT / word).is_dir()
        if "-m" in chosen.command and chosen.name != "tests":
            module = chosen.command[chosen.command.index("-m") + 1]
            assert (
                gpu.ROOT.joinpath(*module.split(".")).with_suffix(".py").exists()
                or (gpu.ROOT / module).is_dir()
            )


def test_patterns_choose_tests_by_family_or_operator() -> None:
    tests = {s.name: s.command for s in gpu.dry_steps(["influence.topk/small", "gramian/*", "influence"])}[
        "tests"
    ]
    assert tests[tests.index("-k") + 1] == "influence or gramian"
    assert "-k" not in gpu.dry_steps([])[-1].command


@pytest.mark.slow
def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert gpu.main(["--dry-run", "--until", "900"]) == 0
    told = capsys.readouterr().out
    assert "0 failed" in told
    assert [line.split()[1] for line in told.splitlines()[-3:]] == [PASSED] * 3

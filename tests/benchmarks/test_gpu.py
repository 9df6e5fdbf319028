from __future__ import annotations

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
    for chosen in gpu.steps(["surgery"], tmp_path / "results.json", 60):
        for word in chosen.command:
            assert not word.startswith("tests/") or (gpu.ROOT / word).is_dir()
        if "-m" in chosen.command and chosen.name != "tests":
            module = chosen.command[chosen.command.index("-m") + 1]
            assert (
                gpu.ROOT.joinpath(*module.split(".")).with_suffix(".py").exists()
                or (gpu.ROOT / module).is_dir()
            )


@pytest.mark.slow
def test_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("triton")
    assert gpu.main(["--dry-run", "--until", "900"]) == 0
    told = capsys.readouterr().out
    assert "0 failed" in told
    assert [line.split()[1] for line in told.splitlines()[-3:]] == [PASSED] * 3

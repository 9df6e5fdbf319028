"""Everything that a GPU can prove, in one go: `python -m benchmarks.gpu [PATTERN ...]`, which is `make gpu`.

Builds, diagnoses, compiles every launch on all cores, runs the GPU tests, looks for bad memory accesses, races
the benchmark cases, and writes `benchmarks/results/<device>.json`. Correctness comes first; every step ends at the
time limit with what it has, and `--resume` goes on with the steps that have not passed on this commit.

`--dry-run` needs no GPU: the tests run on the CPU's kernels, and launchers go up to the launch.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "out" / "gpu"
PASSED, FAILED, SKIPPED, LATE = "passed", "FAILED", "skipped", "out of time"
_TESTS = ("tests/gpu", "tests/triton/interpreted")


@dataclass(frozen=True)
class Step:
    """One command of the run. `missing` says why it cannot run here."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended, after so many seconds; `note` is the last line that it printed, or why it did not run."""

    status: str
    seconds: float = 0.0
    note: str = ""


def steps(patterns: Sequence[str], results: Path, seconds: float) -> list[Step]:
    """The run on a device."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer")
    chosen = ("-k", " or ".join(patterns)) if patterns else ()
    race = ("-m", "benchmarks", "run", *patterns, "--device", "cuda", "--peers", "--time-limit", "10")
    check = ("--tool", "memcheck", "--error-exitcode", "1", python, "-m", "unlearn_kernels")
    return [
        Step("build", (python, "setup.py", "build_ext", "--inplace")),
        Step("launches", (python, "-m", "benchmarks.launches", *patterns)),
        Step("diagnosis", (python, "-m", "unlearn_kernels")),
        Step("tests", (python, "-m", "pytest", "-q", "-m", "gpu", *chosen, *_TESTS)),
        Step("memory", (sanitizer or "", *check), missing=None if sanitizer else "no compute-sanitizer here"),
        Step("benchmarks", (python, *race, "--resume", "--until", f"{seconds:.0f}", "--json", str(results))),
    ]


def dry_steps(patterns: Sequence[str]) -> list[Step]:
    """The run without a device."""
    python = sys.executable
    chosen = ("-k", " or ".join(patterns)) if patterns else ()
    return [
        Step("launches", (python, "-m", "benchmarks.launches", *patterns)),
        Step("diagnosis", (python, "-m", "unlearn_kernels")),
        Step(
            "tests",
            (python, "-m", "pytest", "-q", "-m", "gpu", *chosen, "tests/gpu"),
            {"GPU_TESTS_ON": "cpu"},
        ),
    ]


def run(step: Step, seconds: float) -> Outcome:
    """Runs one step, its output on the terminal and in a log; ends it after so many seconds."""
    if step.missing:
        return Outcome(SKIPPED, note=step.missing)
    if seconds <= 0:
        return Outcome(LATE)
    begun, last = time.monotonic(), ""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", **step.environment}
    command = ("timeout", "--signal=INT", "--kill-after=10", f"{seconds:.0f}", *step.command)
    with (LOGS / f"{step.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
            last = line.strip() or last
    status = {0: PASSED, 124: LATE, 137: LATE}.get(process.wait(), FAILED)
    return Outcome(status, time.monotonic() - begun, last)


def run_all(chosen: Sequence[Step], done: Mapping[str, Outcome], until: float) -> dict[str, Outcome]:
    """All steps in order, without those that have passed before."""
    LOGS.mkdir(parents=True, exist_ok=True)
    begun, outcomes = time.monotonic(), dict(done)
    for step in chosen:
        if outcomes.get(step.name, Outcome(FAILED)).status == PASSED:
            continue
        print(f"\n== {step.name}: {' '.join(step.command)}", flush=True)
        outcomes[step.name] = run(step, until - (time.monotonic() - begun))
        _save(outcomes)
    return outcomes


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """A line a step."""
    width = max(map(len, outcomes), default=0)
    rows = (f"{name:{width}}  {o.status:11}  {o.seconds:6.0f} s  {o.note}" for name, o in outcomes.items())
    return "\n".join(rows)


def _state() -> Path:
    return LOGS / "state.json"


def _save(outcomes: Mapping[str, Outcome]) -> None:
    content = {"commit": machine.commit(), "outcomes": {name: vars(o) for name, o in outcomes.items()}}
    _state().write_text(json.dumps(content, indent=1) + "\n")


def _before() -> dict[str, Outcome]:
    """What an earlier run of this commit has done."""
    if not _state().exists():
        return {}
    content = json.loads(_state().read_text())
    if content["commit"] != machine.commit():
        return {}
    return {name: Outcome(**outcome) for name, outcome in content["outcomes"].items()}


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("pattern", nargs="*", metavar="PATTERN", help="a family, or part of a case's name")
    parser.add_argument("--dry-run", action="store_true", help="everything up to the launch, without a GPU")
    parser.add_argument("--resume", action="store_true", help="without the steps that passed on this commit")
    parser.add_argument("--until", type=float, default=570.0, metavar="S", help="end after S seconds (570)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the status is 1 where a step failed or had no time."""
    parsed = _parsed(arguments)
    if not parsed.dry_run and not torch.cuda.is_available():
        print("make gpu: torch finds no CUDA device; --dry-run does what needs none", file=sys.stderr)
        return 2
    done = _before() if parsed.resume else {}
    if parsed.dry_run:
        outcomes = run_all(dry_steps(parsed.pattern), done, parsed.until)
    else:
        results = ROOT / "benchmarks" / "results" / f"{machine.slug('cuda')}.json"
        outcomes = run_all(steps(parsed.pattern, results, parsed.until), done, parsed.until)
    print(f"\n{summary(outcomes)}")
    return int(any(o.status in (FAILED, LATE) for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

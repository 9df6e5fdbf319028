"""Everything that a GPU can prove, in one go: `python -m benchmarks.gpu [PATTERN ...]`, which is `make gpu`.

Builds, diagnoses, compiles every launch on all cores, runs the GPU tests, looks for bad memory accesses, races
the benchmark cases, and writes `benchmarks/results/<device>.json`. Correctness comes first; every step ends at the
time limit with what it has, and `--resume` goes on with the steps of the same call that have not passed on this commit.
The results of cases that were measured on another commit are put into `out/gpu`; those of this one are kept.

`--dry-run` needs no GPU: the tests run on the CPU's kernels, and launchers go up to the launch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "out" / "gpu"
PASSED, FAILED, SKIPPED, LATE = "passed", "FAILED", "skipped", "out of time"
_TESTS = ("tests/gpu", "tests/triton/interpreted")
_CASE_SECONDS = 4
_LEFT = "{left}"  # in a command: the seconds that it has
_TO_END = 20  # seconds before its limit at which a step that knows it begins nothing more


@dataclass(frozen=True)
class Step:
    """One command of the run, which ends after `most` seconds. `missing` says why it cannot run here."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    most: float = math.inf


@dataclass(frozen=True)
class Outcome:
    """How a step ended, after so many seconds; `note` is the last line that it printed, or why it did not run."""

    status: str
    seconds: float = 0.0
    note: str = ""


def _tests_of(patterns: Sequence[str]) -> tuple[str, ...]:
    """The choice of tests: `influence.topk/small` asks for those of influence, `gramian/*` for those of gramian."""
    words = [found.group() for pattern in patterns if (found := re.search(r"\w+", pattern))]
    return ("-k", " or ".join(dict.fromkeys(words))) if words else ()


def _processes() -> tuple[str, ...]:
    """Most of a test's time is Triton's compiler: as many at once as there are cores, if pytest can."""
    if importlib.util.find_spec("xdist") is None:
        return ()
    return "-n", str(min(8, len(os.sched_getaffinity(0))))


def steps(patterns: Sequence[str], results: Path) -> list[Step]:
    """The run on a device. Limits leave the benchmarks time whatever happens before."""
    python = sys.executable
    sanitizer = shutil.which("compute-sanitizer")
    chosen = _tests_of(patterns)
    race = (
        "-m",
        "benchmarks",
        "run",
        *patterns,
        "--device",
        "cuda",
        "--peers",
        "--time-limit",
        str(_CASE_SECONDS),
    )
    check = ("--tool", "memcheck", "--error-exitcode", "1", python, "-m", "unlearn_kernels")
    return [
        Step("build", (python, "setup.py", "build_ext", "--inplace"), most=180),
        Step("launches", (python, "-m", "benchmarks.launches", *patterns), most=120),
        Step("diagnosis", (python, "-m", "unlearn_kernels"), most=60),
        Step("tests", (python, "-m", "pytest", "-q", "-m", "gpu", *_processes(), *chosen, *_TESTS), most=200),
        Step(
            "memory",
            (sanitizer or "", *check),
            missing=None if sanitizer else "no compute-sanitizer here",
            most=90,
        ),
        Step("benchmarks", (python, *race, "--resume", "--until", _LEFT, "--json", str(results))),
    ]


def dry_steps(patterns: Sequence[str]) -> list[Step]:
    """The run without a device."""
    python = sys.executable
    chosen = _tests_of(patterns)
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
    begun, last, seconds = time.monotonic(), "", min(seconds, step.most)
    environment = {**os.environ, **_paths(), **step.environment}
    left = f"{max(1.0, seconds - _TO_END):.0f}"
    words = (left if word == _LEFT else word for word in step.command)
    command = ("timeout", "--signal=INT", "--kill-after=10", f"{max(1.0, seconds):.0f}", *words)
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


def _paths() -> dict[str, str]:
    """Where steps find modules, and programs such as ninja that came with this Python's packages."""
    programs = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.prefix) / "bin")))
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}", "PATH": programs, "PYTHONUNBUFFERED": "1"}


def run_all(
    chosen: Sequence[Step], done: Mapping[str, Outcome], until: float, call: str = ""
) -> dict[str, Outcome]:
    """All steps in order, without those that have passed before. `call` says which run it is."""
    LOGS.mkdir(parents=True, exist_ok=True)
    begun, outcomes = time.monotonic(), dict(done)
    for step in chosen:
        if outcomes.get(step.name, Outcome(FAILED)).status == PASSED:
            continue
        print(f"\n== {step.name}: {' '.join(step.command)}", flush=True)
        outcomes[step.name] = run(step, until - (time.monotonic() - begun))
        _save(outcomes, call)
    return outcomes


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """A line a step."""
    width = max(map(len, outcomes), default=0)
    rows = (f"{name:{width}}  {o.status:11}  {o.seconds:6.0f} s  {o.note}" for name, o in outcomes.items())
    return "\n".join(rows)


def _state() -> Path:
    return LOGS / "state.json"


def _save(outcomes: Mapping[str, Outcome], call: str = "") -> None:
    calls = {**_calls(), call: {name: vars(o) for name, o in outcomes.items()}}
    _state().write_text(json.dumps({"commit": machine.commit(), "calls": calls}, indent=1) + "\n")


def _calls() -> dict[str, dict[str, Any]]:
    """What earlier runs of this commit have done: of each family, on a device or dry."""
    if not _state().exists():
        return {}
    content = json.loads(_state().read_text())
    return dict(content["calls"]) if content["commit"] == machine.commit() else {}


def _before(call: str = "") -> dict[str, Outcome]:
    """What an earlier run of the same kind has done at this commit."""
    return {name: Outcome(**outcome) for name, outcome in _calls().get(call, {}).items()}


def set_aside(results: Path, resume: bool) -> Path | None:
    """Moves results that this run cannot add to into the logs, and says where they are.

    They stay if they are of this commit; of a tree that differs from its commit, or has none, only to go on with.
    """
    commit = machine.commit()
    known = commit is not None and (resume or not commit.endswith("+"))
    if not results.exists() or (known and json.loads(results.read_text())["run"]["commit"] == commit):
        return None
    LOGS.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(results, LOGS / f"before-{results.name}"))


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
    call = " ".join(("dry" if parsed.dry_run else machine.slug("cuda"), *parsed.pattern))
    done = _before(call) if parsed.resume else {}
    if parsed.dry_run:
        chosen = dry_steps(parsed.pattern)
    else:
        results = ROOT / "benchmarks" / "results" / f"{machine.slug('cuda')}.json"
        moved = set_aside(results, parsed.resume)
        if moved:
            print(f"results of another commit are in {moved}")
        chosen = steps(parsed.pattern, results)
    outcomes = run_all(chosen, done, parsed.until, call)
    print(f"\n{summary(outcomes)}")
    return int(any(o.status in (FAILED, LATE) for o in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())

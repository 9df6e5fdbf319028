"""`python -m benchmarks list | run | compare`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, memory, registry, report, results
from benchmarks.compare import compare
from benchmarks.floors import Floor
from benchmarks.runner import Race, Settings

_OUT_OF_TIME = 124  # the status that the program `timeout` gives


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. The status is 1 where a number of ours is wrong or a comparison found a loss.

    It is 124 where --until left cases for another run.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except ValueError as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="the cases, their shapes and providers")
    listing.add_argument("pattern", nargs="*", metavar="PATTERN")
    listing.set_defaults(command=_list)

    run = commands.add_parser(
        "run", help="measure the cases that match a PATTERN (part of a name, or a glob)"
    )
    run.add_argument("pattern", nargs="*", metavar="PATTERN", help="all cases if there is none")
    run.add_argument("--peers", action="store_true", help="race other packages and formulations too")
    run.add_argument("--threads", type=int, metavar="N", help="instead of what each case asks for")
    run.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    run.add_argument("--json", type=Path, metavar="FILE", help="write all rows")
    run.add_argument("--resume", action="store_true", help="keep the cases that the file of --json has")
    run.add_argument("--plot", type=Path, metavar="FILE.png", help="draw all rows")
    run.add_argument("--repeats", type=int, default=30, metavar="N", help="samples per provider (default 30)")
    run.add_argument(
        "--time-limit",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds per case, shared by its providers; "
        "one whose single call would take longer is skipped (default 60)",
    )
    run.add_argument(
        "--until", type=float, metavar="S", help="begin no case after S seconds; --resume does the rest"
    )
    run.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: freed memory is reused, as with a caching allocator (fair to peers that allocate); "
        "default: as glibc does it",
    )
    run.set_defaults(command=_run)

    comparison = commands.add_parser("compare", help="our own rows of two result files; 1 if B is worse")
    comparison.add_argument("before", type=Path, metavar="A.json")
    comparison.add_argument("after", type=Path, metavar="B.json")
    comparison.add_argument("--tolerance", type=float, default=0.10, metavar="X", help="default 0.10")
    comparison.set_defaults(command=_compare)
    return parser


def _list(parsed: argparse.Namespace) -> int:
    print(report.listing(registry.select(parsed.pattern)))
    return 0


def _run(parsed: argparse.Namespace) -> int:
    _validate(parsed)
    cases = registry.select(parsed.pattern)
    settings = Settings(parsed.peers, parsed.repeats, parsed.time_limit, parsed.threads, parsed.device)
    kept = parsed.allocator == "keep" and memory.keep_freed_memory()
    run = machine.describe(parsed.device) | {
        "allocator": "freed memory kept" if kept else "system default",
        "repeats": parsed.repeats,
        "time_limit": parsed.time_limit,
    }
    done = _done(parsed.json, run) if parsed.resume else []
    if parsed.until:
        cases = spread(cases)
    rows = _measure(cases, settings, run, done, parsed)
    if parsed.plot:
        from benchmarks.plot import plot

        plot(rows, parsed.plot, f"{run['machine']}, {run['isa']}, {run['date']}, commit {run['commit']}")
    left = len({case.name for case in cases} - {row.case for row in rows})
    if left:
        print(f"{left} of {len(cases)} cases are left for --resume")
    wrong = any(row.role == "ours" and row.status == results.WRONG for row in rows)
    return 1 if wrong else _OUT_OF_TIME if left else 0


def spread(cases: Sequence[registry.Case]) -> list[registry.Case]:
    """The cases with those of all families in turns, small ones last: what a run out of time has is of each."""
    met: dict[tuple[bool, str], int] = {}
    turns = []
    for case in cases:
        small, family = "/small/" in case.name, case.name.partition(".")[0]
        met[small, family] = met.get((small, family), -1) + 1
        turns.append((small, met[small, family], case))
    return [case for *_, case in sorted(turns, key=lambda turn: turn[:2])]


def _validate(parsed: argparse.Namespace) -> None:
    for name in ("threads", "repeats", "time_limit", "until"):
        value = getattr(parsed, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')}: must be positive, got {value}")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: cuda was asked for but torch finds no CUDA device")


def _done(path: Path | None, run: dict[str, Any]) -> list[results.Row]:
    """The rows that an earlier part of this run wrote."""
    if path is None:
        raise ValueError("--resume: needs --json, the file to go on with")
    if not path.exists():
        return []
    before, rows = results.load(path)
    for key in ("commit", "machine", "isa", "versions", "allocator", "repeats", "time_limit"):
        if before[key] != run[key]:
            raise ValueError(f"--resume: {key} must be that of {path}, {before[key]}, got {run[key]}")
    return rows


def _measure(
    cases: Sequence[registry.Case],
    settings: Settings,
    run: dict[str, Any],
    done: Sequence[results.Row],
    parsed: argparse.Namespace,
) -> list[results.Row]:
    begun, known = time.monotonic(), {row.case for row in done}
    cases = [case for case in cases if case.name not in known]
    facts = {key: run[key] for key in ("machine", "isa", "versions", "commit", "date")}
    default_threads = torch.get_num_threads()
    floors: dict[int, Floor] = {}
    rows = list(done)
    with report.screen(len(cases)) as screen:
        for case in cases:
            if parsed.until and time.monotonic() - begun > parsed.until:
                break
            screen.start(case.name)
            threads = settings.threads or case.threads or default_threads
            if threads not in floors:
                floors[threads] = Floor(settings.device, threads)
            found = Race(case, settings, floors[threads], facts, screen.step).run()
            rows += found
            screen.finish(found)
            if any(provider.compiled for provider in case.providers):
                torch.compiler.reset()
            if parsed.json:
                results.save(parsed.json, run, rows)
    return rows


def _compare(parsed: argparse.Namespace) -> int:
    (_, before), (_, after) = results.load(parsed.before), results.load(parsed.after)
    changes = compare(before, after, parsed.tolerance)
    print(report.differences(changes))
    return int(any(change.regressed for change in changes))


if __name__ == "__main__":
    sys.exit(main())

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import report, results
from benchmarks.compare import compare
from benchmarks.registry import Call, Case, Provider
from benchmarks.results import WRONG, Row

RowMaker = Callable[..., Row]
FLOOR = {"fma_gflops": 100.0, "fma_source": "loop", "read_gbs": 20.0, "axpy_gbs": 25.0}


def rows_of_a_case(make_row: RowMaker) -> list[Row]:
    ours = make_row(seconds=0.001, seconds_min=0.0009, error=1e-7, peak_bytes=2_000_000, output_bytes=500_000)
    peer = make_row("peer", "peer", seconds=0.003, seconds_min=0.002, metrics={"recall": 1.0})
    wrong = make_row("broken", "peer", status=WRONG, error=0.5, bound=1e-6)
    for row in (ours, peer, wrong):
        row.floor_seconds, row.floor = 0.0005, FLOOR
    results.set_ratios([ours, peer, wrong])
    return [ours, peer, wrong]


def test_the_table_has_a_line_per_provider(make_row: RowMaker) -> None:
    heading, floor, columns, ours, peer, wrong = report.table(rows_of_a_case(make_row)).splitlines()
    assert heading == "doubling/tiny   1000   1 thread"
    assert floor.startswith("floor 0.5 ms (100 GFLOP/s by loop")
    assert columns.split()[:3] == ["provider", "ms", "min"]
    assert ours.split() == ["ours", "1", "0.9", "1", "–", "2", "2.0", "0.5", "1.0e-07", "ok"]
    assert peer.split() == ["peer", "3", "2", "3", "–", "6", "–", "–", "–", "ok:", "recall", "1"]
    assert wrong.split() == [
        "broken",
        "–",
        "–",
        "–",
        "–",
        "–",
        "–",
        "–",
        "5.0e-01",
        "WRONG",
        "(bound",
        "1.0e-06)",
    ]


def test_the_comparison_names_both_sides(make_row: RowMaker) -> None:
    text = report.differences(compare([make_row(seconds=1.0)], [make_row(seconds=2.0)]))
    assert text.splitlines()[1].split() == ["doubling/tiny", "ours", "2", "seconds", "–", "slower"]


def test_the_plot_is_a_png(make_row: RowMaker, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import plot

    path = tmp_path / "out.png"
    plot(rows_of_a_case(make_row), path, "machine")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--plot: no row has a time"):
        plot([make_row()], path, "machine")


def test_list_shows_the_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["list", "topk"]) == 0
    assert "influence.topk/100x200k/float32" in capsys.readouterr().out


def test_run_writes_complete_rows(
    make_case: Callable[..., Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command.registry, "select", lambda patterns: (make_case(),))
    path = tmp_path / "out.json"
    arguments = ["run", "--json", str(path), "--repeats", "2", "--threads", "1", "--allocator", "default"]
    assert command.main(arguments) == 0
    assert "doubling/tiny" in capsys.readouterr().out
    content = json.loads(path.read_text())
    (row,) = content["rows"]
    wanted = (
        "seconds",
        "peak_bytes",
        "error",
        "flops",
        "bytes",
        "vs_floor",
        "machine",
        "versions",
        "isa",
        "date",
    )
    assert all(row[name] not in (None, "", {}) for name in wanted)
    assert content["run"]["cpu"]["cores"] >= 1
    assert command.main(["compare", str(path), str(path)]) == 0


def test_a_run_is_resumed_where_it_ended(
    make_case: Callable[..., Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_case()
    cases = (first, dataclasses.replace(first, name="doubling/second"))
    monkeypatch.setattr(command.registry, "select", lambda patterns: cases)
    path = tmp_path / "out.json"
    run = ["run", "--json", str(path), "--repeats", "1", "--threads", "1", "--allocator", "default"]
    assert command.main([*run, "--until", "1e-9"]) == 124
    assert not path.exists()
    assert command.main(run) == 0
    content, rows = results.load(path)
    results.save(path, content, rows[: len(rows) // 2])
    assert command.main([*run, "--resume"]) == 0
    _, resumed = results.load(path)
    assert [row.case for row in resumed] == [row.case for row in rows]
    assert resumed[0].seconds == rows[0].seconds


def test_a_limited_run_has_something_of_each_family(make_case: Callable[..., Case]) -> None:
    names = ("a.f/small/x", "a.f/large/x", "a.g/large/x", "b.f/small/x", "b.f/large/x")
    cases = [dataclasses.replace(make_case(), name=name) for name in names]
    order = [case.name for case in command.spread(cases)]
    assert order == ["a.f/large/x", "b.f/large/x", "a.g/large/x", "a.f/small/x", "b.f/small/x"]


def test_a_run_of_another_commit_is_not_resumed(
    make_case: Callable[..., Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command.registry, "select", lambda patterns: (make_case(),))
    path = tmp_path / "out.json"
    run = ["run", "--json", str(path), "--repeats", "1", "--threads", "1", "--allocator", "default"]
    assert command.main(run) == 0
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"run": content["run"] | {"commit": "0123"}}))
    with pytest.raises(SystemExit):
        command.main([*run, "--resume"])
    assert "--resume: commit must be that of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["run", "--resume"])
    assert "--resume: needs --json" in capsys.readouterr().err


def test_run_tells_a_wrong_number_by_its_status(
    make_case: Callable[..., Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Provider("ours", lambda x: Call(lambda: x * 3), "ours")
    monkeypatch.setattr(command.registry, "select", lambda patterns: (make_case(wrong),))
    assert command.main(["run", "--repeats", "1", "--threads", "1", "--allocator", "default"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nonsense"], "no case matches 'nonsense'"),
        (["run", "topk", "--threads", "0"], "--threads: must be positive, got 0"),
        (["compare", "a.json", "b.json", "--tolerance", "7"], "tolerance"),
    ],
)
def test_bad_arguments_are_explained(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments[0] == "compare":
        for index in (1, 2):
            path = tmp_path / arguments[index]
            results.save(path, {}, [])
            arguments = [*arguments[:index], str(path), *arguments[index + 1 :]]
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err

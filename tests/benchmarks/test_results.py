from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import WRONG, Row

RowMaker = Callable[..., Row]


def test_ratios_are_seconds_over_seconds(make_row: RowMaker) -> None:
    ours = make_row(seconds=1.0, floor_seconds=0.5)
    plain = make_row("plain", "plain", seconds=4.0, floor_seconds=0.5)
    peer = make_row("peer", "peer", seconds=2.0, floor_seconds=0.5)
    results.set_ratios([ours, plain, peer])
    assert ours.vs_peers == {"plain": 0.25, "peer": 0.5}
    assert (ours.vs_plain, ours.vs_floor) == (0.25, 2.0)
    assert peer.vs_peers == {"ours": 2.0, "plain": 0.5}


def test_wrong_and_missing_rows_give_and_get_no_ratio(make_row: RowMaker) -> None:
    ours = make_row(seconds=1.0)
    wrong = make_row("wrong", "peer", seconds=3.0, status=WRONG)
    absent = make_row("absent", "peer", status="not installed: absent")
    results.set_ratios([ours, wrong, absent])
    assert ours.vs_peers == wrong.vs_peers == absent.vs_peers == {}


@pytest.mark.parametrize(
    ("error", "status"), [(1e-7, "ok"), (1e-6, "ok"), (2e-6, WRONG), (float("inf"), WRONG)]
)
def test_judgement(make_row: RowMaker, error: float, status: str) -> None:
    row = make_row(error=error, bound=1e-6)
    results.judge(row)
    assert row.status == status


def test_judgement_keeps_other_reasons(make_row: RowMaker) -> None:
    row = make_row(error=1.0, bound=1e-6, status="failed: x")
    results.judge(row)
    assert row.status == "failed: x"


def test_a_file_comes_back_as_it_was(make_row: RowMaker, tmp_path: Path) -> None:
    row = make_row(seconds=1.5, vs_peers={"a": 2.0}, metrics={"recall": 1.0}, versions={"torch": "2"})
    path = tmp_path / "new" / "result.json"
    results.save(path, {"date": "today"}, [row])
    run, rows = results.load(path)
    assert run == {"date": "today"}
    assert [dataclasses.asdict(r) for r in rows] == [dataclasses.asdict(row)]
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0, "run": {}, "rows": []}')
    with pytest.raises(ValueError, match=r"old.json: schema must be 1, got 0"):
        results.load(path)

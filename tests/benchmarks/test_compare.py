from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks.compare import compare
from benchmarks.results import WRONG, Row

RowMaker = Callable[..., Row]
MB = 1 << 20


def verdict(before: Row, after: Row, tolerance: float = 0.10) -> str:
    (change,) = compare([before], [after], tolerance)
    return change.verdict


@pytest.mark.parametrize(
    ("after", "expected"),
    [(1.0, "same"), (1.09, "same"), (1.11, "slower"), (0.92, "same"), (0.90, "faster")],
)
def test_seconds(make_row: RowMaker, after: float, expected: str) -> None:
    assert verdict(make_row(seconds=1.0), make_row(seconds=after)) == expected


def test_times_are_compared_in_floors_of_their_own_run(make_row: RowMaker) -> None:
    before, after = make_row(seconds=1.0, vs_floor=2.0), make_row(seconds=3.0, vs_floor=2.0)
    (change,) = compare([before], [after])
    assert (change.verdict, change.unit, change.time) == ("same", "floors", 1.0)


def test_tolerance(make_row: RowMaker) -> None:
    assert verdict(make_row(seconds=1.0), make_row(seconds=1.4), tolerance=0.5) == "same"
    with pytest.raises(ValueError, match="tolerance: must be between 0 and 1, got 10"):
        compare([], [], 10)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (10 * MB, 20 * MB, "more memory"),
        (10 * MB, int(10.5 * MB), "same"),
        (0, MB // 2, "same"),
        (0, 3 * MB, "more memory"),
        (None, 3 * MB, "same"),
    ],
)
def test_memory(make_row: RowMaker, before: int | None, after: int, expected: str) -> None:
    rows = make_row(seconds=1.0, peak_bytes=before), make_row(seconds=1.0, peak_bytes=after)
    assert verdict(*rows) == expected


def test_a_number_that_became_wrong_is_lost(make_row: RowMaker) -> None:
    (change,) = compare([make_row(seconds=1.0)], [make_row(status=WRONG)])
    assert change.verdict == "lost"
    assert change.regressed


def test_rows_in_one_file_only(make_row: RowMaker) -> None:
    row, other = make_row(seconds=1.0), make_row(seconds=1.0, threads=2)
    changes = compare([row], [other])
    assert [change.verdict for change in changes] == ["lost", "gained"]
    assert not changes[1].regressed


def test_peers_are_not_compared(make_row: RowMaker) -> None:
    assert compare([make_row("peer", "peer", seconds=1.0)], [make_row("peer", "peer", seconds=9.0)]) == []

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.floors import Floor
from benchmarks.registry import Call, Case, Provider
from benchmarks.results import OK, WRONG, Row
from benchmarks.runner import Race, Settings

CaseMaker = Callable[..., Case]
SETTINGS = Settings(peers=True, repeats=3, time_limit=2.0)


def times(factor: float) -> Callable[[Tensor], Call]:
    return lambda x: Call(lambda: x * factor)


def race(case: Case, floor: Floor, settings: Settings = SETTINGS) -> dict[str, Row]:
    return {row.provider: row for row in Race(case, settings, floor).run()}


def test_a_row_carries_every_figure(make_case: CaseMaker, floor: Floor) -> None:
    ours, plain = Provider("ours", times(2.0), "ours"), Provider("plain", times(2.0), "plain")
    row = race(make_case(ours, plain), floor)["ours"]
    assert row.status == OK
    assert row.repeats == 3
    assert 0 < row.seconds_min <= row.seconds
    assert row.error == 0.0
    assert row.floor_seconds == max(1000 / floor.rates["fma"], 8000 / floor.rates["read"])
    assert row.vs_floor == row.seconds / row.floor_seconds
    assert row.vs_plain == row.vs_peers["plain"]


def test_a_wrong_provider_gets_no_time_and_no_ratio(make_case: CaseMaker, floor: Floor) -> None:
    wrong = Provider("ours", times(2.001), "ours")
    plain = Provider("plain", times(2.0), "plain")
    rows = race(make_case(wrong, plain), floor)
    ours = rows["ours"]
    assert ours.status == WRONG
    assert ours.error == pytest.approx(5e-4, rel=1e-2)
    assert (ours.seconds, ours.vs_plain, ours.vs_floor, ours.vs_peers) == (None, None, None, {})
    assert rows["plain"].status == OK
    assert rows["plain"].vs_peers == {}


def test_not_a_number_is_wrong(make_case: CaseMaker, floor: Floor) -> None:
    row = race(make_case(Provider("ours", times(float("nan")), "ours")), floor)["ours"]
    assert (row.status, row.error, row.seconds) == (WRONG, None, None)


def test_peers_are_held_to_their_own_bound(make_case: CaseMaker, floor: Floor) -> None:
    ours, peer = Provider("ours", times(2.0), "ours"), Provider("peer", times(2.001))
    assert race(make_case(ours, peer), floor)["peer"].status == OK
    assert race(make_case(ours, peer, peer_bound=1e-4), floor)["peer"].status == WRONG


def test_the_error_of_eager_raises_our_bound(make_case: CaseMaker, floor: Floor) -> None:
    ours, plain = Provider("ours", times(2.0002), "ours"), Provider("plain", times(2.0002), "plain")
    assert race(make_case(ours, plain), floor)["ours"].status == WRONG
    assert race(make_case(ours, plain, relative_to="plain"), floor)["ours"].status == OK


def test_missing_failing_and_slow_providers_are_rows_too(make_case: CaseMaker, floor: Floor) -> None:
    def fails(_: Tensor) -> Call:
        raise RuntimeError("no such thing")

    def fails_later(x: Tensor) -> Call:
        calls: list[int] = []

        def run() -> Tensor:
            calls.append(1)
            if len(calls) > 1:
                raise RuntimeError("only once")
            return x * 2

        return Call(run)

    case = make_case(
        Provider("ours", times(2.0), "ours"),
        Provider("missing", times(2.0), requires=("no_such_package",)),
        Provider("elsewhere", times(2.0), devices=("cuda",)),
        Provider("fails", fails),
        Provider("fails later", fails_later),
    )
    rows = race(case, floor)
    assert rows["missing"].status == "not installed: no_such_package"
    assert rows["elsewhere"].status == "not on cpu"
    assert rows["fails"].status == "failed: RuntimeError: no such thing"
    assert rows["fails later"].status == "failed: RuntimeError: only once"
    assert rows["ours"].status == OK
    assert rows["ours"].vs_peers == {}


def test_without_a_reference_nothing_is_measured(make_case: CaseMaker, floor: Floor) -> None:
    def reference(_: Tensor) -> Tensor:
        raise MemoryError("too large")

    row = race(make_case(reference=reference), floor)["ours"]
    assert row.status == "no reference: failed: MemoryError: too large"
    assert row.seconds is None


def test_a_provider_that_would_take_too_long_is_not_started(make_case: CaseMaker, floor: Floor) -> None:
    sizes: list[int] = []

    def build(x: Tensor) -> Call:
        sizes.append(len(x))
        return Call(lambda: x * 2)

    slow = Provider("ours", build, "ours")
    small = make_case(slow, name="doubling/small", make=lambda device: torch.ones(10), flops=1)
    row = race(make_case(slow, warm=small, flops=10**15), floor)["ours"]
    assert row.status.startswith("skipped: a call would take about")
    assert sizes == [10]


def test_peers_stay_out_unless_asked_for(make_case: CaseMaker, floor: Floor) -> None:
    case = make_case(Provider("ours", times(2.0), "ours"), Provider("peer", times(2.0)))
    assert list(race(case, floor, Settings(repeats=1))) == ["ours"]


def test_inputs_are_reset_before_every_call(make_case: CaseMaker, floor: Floor) -> None:
    def in_place(x: Tensor) -> Call:
        work = x.clone()
        return Call(lambda: work.mul_(2), lambda: work.copy_(x))

    seen: list[float] = []
    case = make_case(
        Provider("ours", in_place, "ours"),
        metrics=lambda x, got, expected: seen.append(float(got[0])) or {"first": float(got[0])},
    )
    row = race(case, floor)["ours"]
    assert row.status == OK
    assert row.metrics == {"first": 2.0}


def test_a_yardstick_is_not_judged(make_case: CaseMaker, floor: Floor) -> None:
    ours = Provider("ours", times(2.0), "ours")
    plain = Provider("plain", times(7.0), "plain", yardstick=True)
    rows = race(make_case(ours, plain), floor)
    assert rows["plain"].status == OK
    assert rows["plain"].error is None
    assert rows["ours"].vs_plain == rows["ours"].seconds / rows["plain"].seconds
    assert rows["ours"].vs_peers == {}

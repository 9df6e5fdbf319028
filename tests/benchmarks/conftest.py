from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import floors
from benchmarks.floors import Floor
from benchmarks.registry import Call, Case, Provider
from benchmarks.results import Row

CaseMaker = Callable[..., Case]
RowMaker = Callable[..., Row]


def doubling(factor: float) -> Callable[[Tensor], Call]:
    return lambda x: Call(lambda: x * factor)


@pytest.fixture
def make_case() -> CaseMaker:
    """A case whose task is to double a vector."""

    def make(*providers: Provider, **changes: object) -> Case:
        fields = {
            "name": "doubling/tiny",
            "ops": ("doubling",),
            "shape": "1000",
            "dtype": torch.float32,
            "flops": 1000,
            "bytes": 8000,
            "make": lambda device: torch.arange(1.0, 1001.0, device=device),
            "reference": lambda x: x.double() * 2,
            "error": lambda x, got, expected: float(((got - expected) / expected).abs().max()),
            "providers": providers or (Provider("ours", doubling(2.0), "ours"),),
            "bound": 1e-6,
        }
        return Case(**(fields | changes))

    return make


@pytest.fixture
def make_row() -> RowMaker:
    def make(provider: str = "ours", role: str = "ours", **changes: object) -> Row:
        row = Row("doubling/tiny", ["doubling"], "1000", "float32", "cpu", 1, provider, role)
        for name, value in changes.items():
            setattr(row, name, value)
        return row

    return make


@pytest.fixture(autouse=True)
def short_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(floors._STREAM_BYTES, "cpu", 1 << 20)


@pytest.fixture
def floor() -> Floor:
    return Floor("cpu", 1)

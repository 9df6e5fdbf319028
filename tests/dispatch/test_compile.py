"""`torch.compile(fullgraph=True)` sees through the choice of a backend, and follows when it changes."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from unlearn_kernels import use_backend
from unlearn_kernels._backends import BACKENDS
from unlearn_kernels.per_sample import linear
from unlearn_kernels.testing import randn

A, G = randn(2, 3, 5), randn(2, 3, 4, seed=1)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Recorder:
    """A compiler backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.targets: list[list[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        self.targets.append([str(node.target) for node in graph.graph.nodes])
        return graph

    def kernels(self) -> list[int]:
        """How many of our operators each graph calls."""
        return [sum(target.startswith("unlearn_kernels.") for target in graph) for graph in self.targets]


def norms(a: Tensor, g: Tensor) -> Tensor:
    return linear.sqnorms(a, g)


def test_follows_the_context_around_it() -> None:
    recorder = Recorder()
    compiled = torch.compile(norms, fullgraph=True, backend=recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outside = compiled(A, G)
    with use_backend("reference"):
        inside = compiled(A, G)
    assert recorder.kernels() == [1, 0]
    compiled(A, G)
    assert len(recorder.targets) == 2
    assert torch.equal(outside, norms(A, G))
    assert torch.equal(inside, linear.sqnorms(A, G, backend="reference"))


def test_sees_the_context_inside() -> None:
    def both(a: Tensor, g: Tensor) -> Tensor:
        with use_backend("reference"):
            first = linear.sqnorms(a, g)
        return first + linear.sqnorms(a, g)

    recorder = Recorder()
    result = torch.compile(both, fullgraph=True, backend=recorder)(A, G)
    assert recorder.kernels() == [1]
    assert torch.equal(result, both(A, G))


def test_names_are_checked_while_tracing() -> None:
    def misnamed(a: Tensor, g: Tensor) -> Tensor:
        return linear.sqnorms(a, g, backend="tpu")

    with pytest.raises(Exception, match=", ".join(BACKENDS)):
        torch.compile(misnamed, fullgraph=True, backend="eager")(A, G)

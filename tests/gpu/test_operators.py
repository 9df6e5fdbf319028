"""Every operator on the device: numbers, layouts, repeats, fakes, compilation, graphs."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.test_registry import (
    LAYOUTS,
    RAW,
    Arguments,
    Layout,
    contiguous,
    doubled,
    permuted,
    raw,
    sample_of,
)
from unlearn_kernels import _loader, _ops
from unlearn_kernels._backends import FLOATS, REGISTRY, Operator
from unlearn_kernels._samples import SAMPLES, results, tensors_in
from unlearn_kernels.testing import assert_as_exact_as

pytestmark = pytest.mark.skipif(not _loader.have_C, reason="the extension is not built")

# Each operator with the implementations of a GPU that are built; on the CPU the first stands for C++.
BUILT = ("triton", "cuda") if _loader.have_C_cuda else ("triton",)
OPERATORS = pytest.mark.parametrize(
    ("operator", "backend"),
    [pytest.param(o, b, id=f"{name}-{b}") for name, o in REGISTRY.items() for b in BUILT if b in o.impls],
)
TWINS = [name for name in _ops.LAUNCHERS if name.startswith("cuda_") and _loader.have_C_cuda]
RAW_OPERATORS = pytest.mark.parametrize("name", [*RAW, *TWINS])

# Their launchers write tables of addresses on the host; torch refuses such copies while it captures a graph.
FROM_THE_HOST = {
    *(
        "gramian",
        "combine_",
        "project_conflict_",
        "topk_mask",
        "apply_mask_",
        "surgical_adamw_",
        "weighted_gramian",
    ),
    *("compress", "decompress_", "project_conflict_compressed_"),
}


@pytest.fixture(autouse=True)
def runs_here(request: pytest.FixtureRequest, device: str) -> None:
    """Skips what has no CPU kernel where the CPU stands in."""
    asked = request.node.callspec.params
    if device == "cpu" and (asked.get("backend") == "cuda" or asked.get("name") in TWINS):
        pytest.skip("has no CPU kernel")


def plain(name: str) -> str:
    """The operator whose arguments another takes."""
    return name.removeprefix("cuda_")


def moved(arguments: Arguments, device: str) -> Arguments:
    """The arguments on the device, with the strides that they have."""

    def move(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)

    return tree_map_only(Tensor, move, arguments)


def compare(operator: Operator, backend: str, make: Any, device: str) -> None:
    """The device's implementation against the reference in float64, as near to it as the reference is."""
    backend = backend if device == "cuda" else "cpp"

    def run(name: str, arguments: Arguments) -> list[Tensor]:
        return results(operator.impls[name].call, arguments, differentiable=operator.differentiable)

    actual, eager = run(backend, make()), run("reference", make())
    exact = run("reference", tree_map_only(Tensor, doubled, make()))
    for index, tensors in enumerate(zip(actual, exact, eager, strict=True)):
        floor = (
            4 * torch.finfo(torch.float32).eps if tensors[0].dtype in (torch.float32, torch.float64) else None
        )
        assert_as_exact_as(
            f"result {index}", *tensors, floor=floor if tensors[0].is_floating_point() else 0.0
        )


@OPERATORS
@LAYOUTS
def test_layouts(operator: Operator, backend: str, layout: Layout, device: str) -> None:
    compare(operator, backend, lambda: moved(layout(sample_of(operator)), device), device)


@OPERATORS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_types(operator: Operator, backend: str, dtype: torch.dtype, device: str) -> None:
    compare(operator, backend, lambda: moved(SAMPLES[operator.name](dtype, "cpu"), device), device)


@RAW_OPERATORS
def test_repeats_give_the_same_bits(name: str, device: str) -> None:
    def run() -> list[Tensor]:
        arguments = moved(contiguous(plain(name)), device)
        return [*tensors_in(raw(name)(*arguments)), *tensors_in(arguments)]

    first = run()
    for again in (run(), run()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@RAW_OPERATORS
@pytest.mark.parametrize("layout", [contiguous, permuted], ids=lambda f: f.__name__)
def test_opcheck(name: str, layout: Layout, device: str) -> None:
    torch.library.opcheck(raw(name), moved(layout(plain(name)), device))


@RAW_OPERATORS
def test_compiles_whole(name: str, device: str) -> None:
    torch._dynamo.reset()
    eager, compiled = moved(contiguous(plain(name)), device), moved(contiguous(plain(name)), device)
    expected = [*tensors_in(raw(name)(*eager)), *tensors_in(eager)]
    found = torch.compile(raw(name), fullgraph=True, backend="aot_eager")(*compiled)
    for a, b in zip(expected, [*tensors_in(found), *tensors_in(compiled)], strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda_only
@RAW_OPERATORS
def test_is_captured_in_a_graph(name: str, device: str) -> None:
    arguments, fresh = moved(contiguous(plain(name)), device), moved(contiguous(plain(name)), device)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        raw(name)(*moved(contiguous(plain(name)), device))
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    if plain(name) in FROM_THE_HOST:
        with pytest.raises(RuntimeError, match="captur"), torch.cuda.graph(graph):
            raw(name)(*arguments)
        return
    with torch.cuda.graph(graph):
        captured = list(tensors_in(raw(name)(*arguments)))
    graph.replay()
    for a, b in zip(captured, tensors_in(raw(name)(*fresh)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.cuda_only
@RAW_OPERATORS
def test_the_host_does_not_wait(name: str, device: str) -> None:
    arguments = moved(contiguous(plain(name)), device)
    raw(name)(*moved(contiguous(plain(name)), device))
    torch.cuda.set_sync_debug_mode("error")
    try:
        raw(name)(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")

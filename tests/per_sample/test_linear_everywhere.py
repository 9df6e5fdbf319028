"""The linear layer's verbs under `torch.compile`, on every instruction set, and over addresses beyond 2^31."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from unlearn_kernels import _host
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import TwoSided, linear
from unlearn_kernels.testing import randn

SIDES = TwoSided(randn(3, 30, seed=4), randn(2, 40, seed=5))


def everything(a: Tensor, g: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Every verb once."""
    return (
        linear.dots(a, g, a[:1], g[:1], bias=True),
        linear.dots(a, g, a, g, summed=True, method="direct"),
        *linear.weighted_sum(a, g, w, bias=True),
        *linear.grads(a, g, bias=True),
        linear.project(a, g, SIDES),
        linear.project(a, g, Projection(1200, 7)),
    )


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_for_any_shape(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(everything, fullgraph=True, backend=backend)
    for tokens in (3, 5, 9):
        arguments = randn(2, tokens, 40), randn(2, tokens, 30, seed=1), torch.tensor([0.5, 2.0])
        for x, y in zip(compiled(*arguments), everything(*arguments), strict=True):
            assert torch.equal(x, y)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


VERBS = """
import torch
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import TwoSided, linear
from unlearn_kernels.testing import randn, relative_error
assert torch.ops.unlearn_kernels.isa() == {isa!r}
worst = 0.0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for tokens, d, p in ((1, 37, 21), (67, 130, 35)):
        a, g = randn(3, tokens, d, dtype=dtype).abs(), randn(3, tokens, p, dtype=dtype, seed=1).abs()
        sides = TwoSided(randn(5, p, dtype=dtype, seed=2).abs(), randn(4, d, dtype=dtype, seed=3).abs())
        signs = Projection(d * p, 6)
        exact_layer, exact_sides = (a.double(), g.double()), TwoSided(*(x.double() for x in sides))
        pairs = [
            (linear.grads(a, g).weight, linear.grads(*exact_layer, backend="reference").weight),
            (linear.project(a, g, sides), linear.project(*exact_layer, exact_sides, backend="reference")),
            (linear.weighted_sum(a, g.to(a.dtype), torch.ones(3)).weight, linear.weighted_sum(
                *exact_layer, torch.ones(3), backend="reference").weight.to(dtype)),
        ]
        for method in ("tokens", "direct"):
            exact = linear.dots(*exact_layer, *exact_layer, bias=True, backend="reference")
            pairs.append((linear.dots(a, g, a, g, bias=True, method=method), exact))
        for result, exact in pairs:
            worst = max(worst, relative_error(result, exact) / torch.finfo(result.dtype).eps)
        assert torch.equal(linear.project(a, g, signs), signs(linear.grads(a, g).weight.flatten(1)))
print(worst)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_isa(isa: str) -> None:
    if not _host.can_run(isa):
        pytest.skip(f"this build or processor has no {isa}")
    environment = {**os.environ, "UNLEARN_KERNELS_ISA": isa}
    command = [sys.executable, "-c", VERBS.format(isa=isa)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 8


def test_addresses_beyond_2_to_the_31() -> None:
    """Samples that lie 2^31 elements apart, in memory that is reserved and never touched between them."""
    memory = torch.empty((1 << 31) + 2000, dtype=torch.float16)
    a, g = (memory.as_strided((2, 3, n), (1 << 31, n, 1), at) for n, at in ((40, 0), (30, 1000)))
    a.copy_(randn(2, 3, 40))
    g.copy_(randn(2, 3, 30, seed=1))
    w = torch.tensor([0.5, 2.0])
    for x, y in zip(everything(a, g, w), everything(a.contiguous(), g.contiguous(), w), strict=True):
        assert torch.equal(x, y)

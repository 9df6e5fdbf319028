"""The public functions around the norms: choice of method, weighted sums, errors, compilation."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from unlearn_kernels import _host
from unlearn_kernels.per_sample import linear
from unlearn_kernels.testing import assert_as_exact_as, randn, relative_error


def test_explain_follows_the_cost() -> None:
    long_thin, short_wide = (randn(1, 512, 8), randn(1, 512, 8)), (randn(1, 8, 512), randn(1, 8, 512))
    single = randn(1, 1, 8), randn(1, 1, 8)
    assert linear.explain(*long_thin).method == "direct"
    assert linear.explain(*short_wide).method == "gram"
    assert linear.explain(*single).method == "rank1"
    assert linear.explain(*long_thin).direct == 512 * 8 * 8
    for chosen in (linear.explain(*long_thin), linear.explain(*short_wide)):
        assert (chosen.method == "gram") == (chosen.gram < chosen.direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4,), (4, 6), (4, 2, 3)])
def test_weighted_sum_is_the_gradient_of_the_weighted_loss(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    a, g = randn(*shape, 7, dtype=dtype), randn(*shape, 5, dtype=dtype, seed=1)
    w = torch.tensor([0.5, -2.0, 0.0, 1.0])  # exact in every type, so that only the products round
    layer = torch.nn.Linear(7, 5, dtype=torch.float64)
    scaled = g.double() * w.double().reshape(-1, *[1] * len(shape))
    layer(a.double()).backward(scaled)
    weight, bias = linear.weighted_sum(a, g, w, bias=True)
    assert weight.dtype == bias.dtype == dtype
    eager = scaled.to(dtype).flatten(0, -2).T @ a.flatten(0, -2)
    assert_as_exact_as("weight", weight, layer.weight.grad, eager)
    assert relative_error(bias, layer.bias.grad) <= 4 * torch.finfo(dtype).eps
    assert linear.weighted_sum(a, g, w)[1] is None


def test_weighted_sum_of_unit_weights_after_clipping() -> None:
    a, g = randn(6, 9, 5), randn(6, 9, 4, seed=1)
    factors = linear.sqnorms(a, g).rsqrt()
    unit = linear.sqnorms(a, g * factors[:, None, None])
    torch.testing.assert_close(unit, torch.ones(6))
    total, _ = linear.weighted_sum(a, g, factors)
    torch.testing.assert_close(total, torch.einsum("i,itp,itd->pd", factors, g, a))


A, G = randn(2, 3, 5), randn(2, 3, 4, seed=1)
ERRORS = {
    "A must have at least 2 dimensions": (A[0, 0], G),
    "G must have at least 2 dimensions": (A, G[0, 0]),
    "A must be a floating-point tensor, got torch.int64": (A.long(), G),
    "agree in all dimensions but the last": (A, G[:, :2]),
    "must be on one device": (A, G.to("meta")),
    "must both be float64 or neither": (A.double(), G),
}


@pytest.mark.parametrize(("message", "tensors"), ERRORS.items(), ids=list(ERRORS))
def test_errors_name_the_argument(message: str, tensors: tuple[Tensor, Tensor]) -> None:
    for call in (linear.sqnorms, linear.explain):
        with pytest.raises(ValueError, match=message):
            call(*tensors)


def test_errors_of_method_and_weights() -> None:
    with pytest.raises(ValueError, match="method must be one of direct, gram, rank1, auto, got 'fast'"):
        linear.sqnorms(A, G, method="fast")
    with pytest.raises(ValueError, match="'rank1' needs one token a sample, got 3"):
        linear.sqnorms(A, G, method="rank1")
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        linear.weighted_sum(A, G, torch.ones(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((A[0], G, True, 0), "3 dimensions"),
        ((A, G[:, :2], True, 0), "agree in batch and tokens"),
        ((A.double(), G, True, 0), "float64 cannot be mixed"),
        ((A, G, True, 2), "method 2 does not fit 3 tokens"),
        ((A, G, True, 7), "method 7 does not fit"),
        ((A.long(), G, True, 0), "must be float32"),
    ],
)
def test_the_raw_operator_guards_memory(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.unlearn_kernels.linear_sqnorms(*arguments)


def test_takes_no_part_in_autograd() -> None:
    a, g = A.clone().requires_grad_(), G.clone().requires_grad_()
    norms = linear.sqnorms(a, g)
    assert not norms.requires_grad
    assert torch.equal(norms, linear.sqnorms(A, G))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_for_any_shape(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda a, g: linear.sqnorms(a, g, bias=True) + 1, fullgraph=True, backend=backend
    )
    for tokens in (3, 5, 9):
        a, g = randn(2, tokens, 40), randn(2, tokens, 30, seed=1)
        assert torch.equal(compiled(a, g), linear.sqnorms(a, g, bias=True) + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


NORMS = """
import torch
from unlearn_kernels.per_sample import linear
from unlearn_kernels.testing import randn
assert torch.ops.unlearn_kernels.isa() == {isa!r}
worst = 0.0
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for tokens, d, p in ((1, 37, 21), (19, 37, 21), (67, 130, 35)):
        a, g = randn(3, tokens, d, dtype=dtype), randn(3, tokens, p, dtype=dtype, seed=1)
        exact = linear.sqnorms(a.double(), g.double(), bias=True, backend="reference")
        for method in ("direct", "gram", "auto"):
            result = linear.sqnorms(a, g, bias=True, method=method)
            eps = torch.finfo(result.dtype).eps
            worst = max(worst, ((result - exact) / exact).abs().max().item() / eps)
print(worst)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_isa(isa: str) -> None:
    if not _host.can_run(isa):
        pytest.skip(f"this build or processor has no {isa}")
    environment = {**os.environ, "UNLEARN_KERNELS_ISA": isa}
    command = [sys.executable, "-c", NORMS.format(isa=isa)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 8


def test_an_isa_that_cannot_run_is_refused() -> None:
    environment = {**os.environ, "UNLEARN_KERNELS_ISA": "sse9"}
    code = "import torch, unlearn_kernels; torch.ops.unlearn_kernels.isa()"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "UNLEARN_KERNELS_ISA=sse9: no such variant" in run.stderr

"""The public functions around convolutions: errors, compilation, memory, instruction sets, peers."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.convolutions import LAYERS
from unlearn_kernels import _host
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import conv
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.testing import randn

A, G = randn(2, 4, 6, 5), randn(2, 6, 4, 3, seed=1)
# What is changed of a call with A, G and a kernel of 3, and what the error says.
ERRORS: dict[str, tuple[Tensor, Tensor, dict[str, Any]]] = {
    r"A must have 3 to 5 dimensions \(batch, channels, \*spatial\), got \(4, 6\)": (A[0, :, :, 0], G, {}),
    "A must be a floating-point tensor, got torch.int64": (A.long(), G, {}),
    r"G must have shape \(2, out_channels, 4, 3\), got \(2, 6, 4, 2\)": (A, G[..., :2], {}),
    r"G must have shape \(2, out_channels, 4, 3\), got \(1, 6, 4, 3\)": (A, G[:1], {}),
    "A and G must be on one device": (A, G.to("meta"), {}),
    "A and G must both be float64 or neither": (A.double(), G, {}),
    "padding_mode must be 'zeros', got 'reflect'": (A, G, {"padding_mode": "reflect"}),
    "kernel_size must be an integer of at least 1 or 2 of them, got 0": (A, G, {"kernel_size": 0}),
    r"stride must be an integer of at least 1 or 2 of them, got \(1, 1, 1\)": (A, G, {"stride": (1, 1, 1)}),
    "dilation must be an integer of at least 1 or 2 of them, got -1": (A, G, {"dilation": -1}),
    "padding must be an integer of at least 0 or 2 of them, got -1": (A, G, {"padding": -1}),
    "padding must be 'same', 'valid' or integers, got 'full'": (A, G, {"padding": "full"}),
    "padding 'same' needs a stride of 1": (A, G, {"padding": "same", "stride": 2}),
    r"kernel_size \(9, 9\) reaches beyond the padded input": (A, G, {"kernel_size": 9}),
    "groups must divide the channels of A, 4, got 3": (A, G, {"groups": 3}),
    "groups must divide the channels of G, 6, got 4": (A, G, {"groups": 4}),
    "groups must divide the channels of A, 4, got 0": (A, G, {"groups": 0}),
}


@pytest.mark.parametrize(("message", "change"), ERRORS.items(), ids=list(ERRORS))
def test_errors_name_the_argument(message: str, change: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    a, g, arguments = change[0], change[1], {"kernel_size": 3, **change[2]}
    for call in (conv.sqnorms, conv.explain, conv.grads):
        with pytest.raises(ValueError, match=message):
            call(a, g, **arguments)


def test_errors_of_methods_weights_sides_and_projections() -> None:
    with pytest.raises(ValueError, match="method must be one of direct, gram, rank1, auto, got 'fast'"):
        conv.sqnorms(A, G, kernel_size=3, method="fast")
    with pytest.raises(ValueError, match="'rank1' needs one output position a sample, got 12"):
        conv.sqnorms(A, G, kernel_size=3, method="rank1")
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        conv.weighted_sum(A, G, torch.ones(3), kernel_size=3)
    with pytest.raises(ValueError, match=r"A1 and A2 must have the same channels and dimensions, got \(2, 4"):
        conv.dots(A, G, A[:, :3], G, kernel_size=3)
    with pytest.raises(ValueError, match=r"G2 must have shape \(2, out_channels, 4, 3\), got \(1, 6, 4, 3\)"):
        conv.dots(A, G, A, G[:1], kernel_size=3)
    with pytest.raises(ValueError, match="A1 and A2 must be on one device and both be float64 or neither"):
        conv.dots(A, G, A.double(), G.double(), kernel_size=3)
    with pytest.raises(ValueError, match="projection must have dim 216, got 30"):
        conv.project(A, G, Projection(30, 4), kernel_size=3)
    with pytest.raises(
        ValueError, match=r"projection must be \(k_o, 6\) and \(k_i, 36\), got \(2, 6\) and \(2, 6\)"
    ):
        conv.project(A, G, TwoSided(torch.ones(2, 6), torch.ones(2, 6)), kernel_size=3)
    with pytest.raises(ValueError, match="bias must be False with a TwoSided projection"):
        conv.project(A, G, TwoSided(torch.ones(2, 6), torch.ones(2, 36)), kernel_size=3, bias=True)


WINDOW = [1, 3, 3, 1, 1, 1, 0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("a", "g", "window", "groups", "method", "message"),
    [
        (A, G[:, :, None], WINDOW, 1, 0, "5 dimensions, got 4"),
        (A[:, :, None], G[:1, :, None], WINDOW, 1, 0, "agree in batch, got 2 and 1"),
        (A[:, :, None].double(), G[:, :, None], WINDOW, 1, 0, "float64 cannot be mixed"),
        (A[:, :, None], G[:, :, None], WINDOW[:6], 1, 0, "12 numbers, got 6"),
        (A[:, :, None], G[:, :, None], [0] * 12, 1, 0, "must be positive"),
        (A[:, :, None], G[:, :, None], WINDOW, 5, 0, "groups 5 must divide 4 and 6"),
        (A[:, :, None], G[:, :, None], WINDOW, 1, 2, "method 2 does not fit 12 positions"),
        (A[:, :, None].long(), G[:, :, None], WINDOW, 1, 0, "must be float32"),
    ],
)
def test_the_raw_operator_guards_memory(
    a: Tensor, g: Tensor, window: list[int], groups: int, method: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.unlearn_kernels.conv_sqnorms(a, g, window, groups, True, method)


def test_takes_no_part_in_autograd() -> None:
    a, g = A.clone().requires_grad_(), G.clone().requires_grad_()
    norms = conv.sqnorms(a, g, kernel_size=3)
    assert not norms.requires_grad
    assert torch.equal(norms, conv.sqnorms(A, G, kernel_size=3))
    assert not conv.weighted_sum(a, g, norms.clone().requires_grad_(), kernel_size=3).weight.requires_grad


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_and_for_any_batch(backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda a, g: conv.sqnorms(a, g, kernel_size=3, bias=True) + 1, fullgraph=True, backend=backend
    )
    for batch in (3, 5, 9):
        a, g = randn(batch, 4, 6, 5), randn(batch, 6, 4, 3, seed=1)
        assert torch.equal(compiled(a, g), conv.sqnorms(a, g, kernel_size=3, bias=True) + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["1d same, even kernel", "2d", "2d one position", "3d"])
def test_norms_are_those_of_opacus(name: str) -> None:
    """Opacus materialises the gradients of a convolution; its numbers are right where its padding is."""
    conv_sample = pytest.importorskip("opacus.grad_sample.conv").compute_conv_grad_sample
    spec = LAYERS[name]
    a, g = spec.pair()
    made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(spec.spatial) - 1]
    module = made(spec.channels, spec.outputs, **spec.arguments)
    theirs = conv_sample(module, [a], g)
    gradients = conv.grads(a, g, bias=True, **spec.arguments)
    torch.testing.assert_close(gradients.weight, theirs[module.weight], rtol=1e-4, atol=1e-4)
    norms = sum(x.flatten(1).double().square().sum(1) for x in theirs.values())
    ours = conv.sqnorms(a, g, bias=True, **spec.arguments)
    torch.testing.assert_close(ours.double(), norms, rtol=1e-5, atol=0)


MEASURE = """
import json
import torch
from unlearn_kernels.per_sample import conv

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(2)
a, g, w = torch.ones(16, 64, 32, 32), torch.ones(16, 96, 32, 32), torch.ones(16)
layer = dict(kernel_size=3, padding=1)
calls = dict(
    direct=lambda a, g, w: conv.sqnorms(a, g, bias=True, method="direct", **layer),
    gram=lambda a, g, w: conv.sqnorms(a, g, bias=True, method="auto", **layer),
    dots=lambda a, g, w: conv.dots(a, g, a, g, bias=True, **layer),
    summed=lambda a, g, w: conv.dots(a, g, a, g, bias=True, summed=True, **layer),
    weighted=lambda a, g, w: conv.weighted_sum(a, g, w, bias=True, **layer),
)
worst = {}
for name, call in calls.items():
    call(a[:2, :8, :7, :7], g[:2, :8, :7, :7], w[:2])  # threads and code, before the measurement
    if name == "gram":
        inputs = torch.ones(4, 512, 7, 7), torch.ones(4, 512, 7, 7), w
    else:
        inputs = a, g, w
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    call(*inputs)
    worst[name] = status("VmHWM") - before
print(json.dumps(worst))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_scratch() -> None:
    """Two threads: 0.6 MB each; for pairs of 16 another 4 MB each. Unfolded, the inputs take 38 MB."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kilobytes = json.loads(run.stdout)
    assert max(kilobytes[name] for name in ("direct", "gram")) <= 1400, kilobytes
    assert kilobytes["weighted"] <= 1400, kilobytes
    assert kilobytes["summed"] <= 2500, kilobytes
    assert kilobytes["dots"] <= 10_000, kilobytes


EACH_ISA = """
import torch
from tests.per_sample.convolutions import LAYERS, by_autograd, flat
from unlearn_kernels.per_sample import conv
from unlearn_kernels.testing import relative_error
assert torch.ops.unlearn_kernels.isa() == {isa!r}
worst = 0.0
for name in ("2d everything", "2d past a block", "2d many tiles", "depthwise", "1d strided", "3d"):
    spec = LAYERS[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        a, g = spec.pair(2, dtype)
        rows = flat(by_autograd(spec, a, g))
        for last in (False, True):
            a = a.movedim(1, -1).contiguous().movedim(-1, 1) if last else a
            results = [conv.sqnorms(a, g, bias=True, method=m, **spec.arguments) for m in ("direct", "gram")]
            results.append(conv.dots(a, g, a, g, bias=True, **spec.arguments).diagonal())
            errors = [relative_error(result, rows.square().sum(1)) for result in results]
            gradients = conv.grads(a, g, bias=True, **spec.arguments)
            errors.append(relative_error(flat(gradients), rows))
            worst = max(worst, *(error / torch.finfo(results[0].dtype).eps for error in errors))
print(worst)
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_isa(isa: str) -> None:
    if not _host.can_run(isa):
        pytest.skip(f"this build or processor has no {isa}")
    environment = {**os.environ, "UNLEARN_KERNELS_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", EACH_ISA.format(isa=isa)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 8

"""What else the head's module does: weighted sums, gradients, projections, errors, compilation, memory."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.per_sample.heads import DTYPES, Case, by_autograd, case, logsumexps
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import lm_head
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.testing import randn, relative_error


def options(x: Case) -> dict[str, Tensor | None]:
    return {"upstream": x.upstream, "bias": x.bias}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_weighted_sum(backend: str | None, dtype: torch.dtype) -> None:
    x, w = case(4, 6, 7, 21, dtype), torch.tensor([0.5, -2.0, 0.0, 1.0])
    weight, bias = lm_head.weighted_sum(x.h, x.W, x.labels, w, **options(x), backend=backend)
    exact = w.double() @ by_autograd(x)
    assert weight.dtype == bias.dtype == dtype
    assert relative_error(torch.cat([weight.flatten(), bias]), exact) <= 4 * torch.finfo(dtype).eps
    with_lse = lm_head.weighted_sum(x.h, x.W, x.labels, w, upstream=x.upstream, lse=logsumexps(x))
    assert with_lse.bias is None


def test_weight_zero_drops_what_is_not_finite() -> None:
    x, w = case(2, 6, 7, 21), torch.tensor([0.0, 1.0])
    x.upstream[0] = torch.inf
    assert lm_head.weighted_sum(x.h, x.W, x.labels, w, upstream=x.upstream).weight.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grads(dtype: torch.dtype) -> None:
    x = case(3, 6, 7, 21, dtype)
    weight, bias = lm_head.grads(x.h, x.W, x.labels, **options(x))
    assert weight.shape == (3, 21, 7)
    eps = torch.finfo(weight.dtype).eps
    assert relative_error(torch.cat([weight.flatten(1), bias], 1), by_autograd(x)) <= 8 * eps
    assert lm_head.grads(x.h, x.W, x.labels).bias is None
    assert lm_head.grads(x.h[:0], x.W, x.labels[:0]).weight.shape == (0, 21, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_sided_projection(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unlearn_kernels.per_sample._lm_head_gradients._BLOCK", 0)
    x = case(3, 6, 7, 300, dtype)
    sides = TwoSided(randn(5, 300), randn(4, 7, seed=1))
    left, right = (side.to(x.h.dtype).double() for side in sides)
    sides = TwoSided(*(side.to(x.h.dtype) for side in sides))
    result = lm_head.project(x.h, x.W, x.labels, sides, **options(x))
    weights, biases = by_autograd(x).split([2100, 300], dim=1)
    exact = torch.cat([(left @ weights.view(3, 300, 7) @ right.T).flatten(1), biases @ left.T], dim=1)
    assert relative_error(result, exact) <= 16 * torch.finfo(result.dtype).eps


def test_random_projection() -> None:
    x = case(3, 6, 7, 21)
    projection = Projection(21 * 8, 40)
    result = lm_head.project(x.h, x.W, x.labels, projection, **options(x))
    assert relative_error(result, projection(by_autograd(x))) <= 1e-6
    with pytest.raises(ValueError, match="projection must have 147 coordinates to fit the head, got 168"):
        lm_head.project(x.h, x.W, x.labels, projection)


X = case(2, 3, 5, 7)
H, W, LABELS = X.h, X.W, X.labels
ERRORS = {
    r"W must be a floating-point tensor \(V, d\)": ((H, W[0], LABELS), {}),
    r"h must have shape \(B, ..., 5\) to fit W, got \(2, 3, 4\)": ((H[..., :4], W, LABELS), {}),
    "h must be a floating-point tensor, got torch.int64": ((H.long(), W, LABELS), {}),
    "h and W must both be float64 or neither": ((H.double(), W, LABELS), {}),
    "h must be on the device of W": ((H.to("meta"), W, LABELS), {}),
    r"labels must have shape \(2, 3\) to fit h, got \(2, 2\)": ((H, W, LABELS[:, :2]), {}),
    "labels must be integers": ((H, W, LABELS.float()), {}),
    "labels must be on the device of W": ((H, W, LABELS.to("meta")), {}),
    r"upstream must have shape \(2, 3\)": ((H, W, LABELS), {"upstream": torch.ones(2)}),
    r"lse must have shape \(2, 3\)": ((H, W, LABELS), {"lse": torch.ones(2)}),
    r"bias must have shape \(7,\), got \(5,\)": ((H, W, LABELS), {"bias": torch.ones(5)}),
    "method must be one of direct, gram, auto, got 'fast'": ((H, W, LABELS), {"method": "fast"}),
}


@pytest.mark.parametrize(("message", "call"), ERRORS.items(), ids=list(ERRORS))
def test_errors_name_the_argument(message: str, call: tuple) -> None:
    with pytest.raises(ValueError, match=message):
        lm_head.sqnorms(*call[0], **call[1])


def test_errors_of_the_other_verbs() -> None:
    with pytest.raises(ValueError, match=r"labels of right must have shape \(2, 3\)"):
        lm_head.dots((H, LABELS), (H, LABELS[:, :2]), W)
    with pytest.raises(ValueError, match=r"w must have shape \(2,\), got \(3,\)"):
        lm_head.weighted_sum(H, W, LABELS, torch.ones(3))
    with pytest.raises(ValueError, match=r"left of the projection must have shape \(k, 7\), got \(2, 6\)"):
        lm_head.project(H, W, LABELS, TwoSided(torch.ones(2, 6), torch.ones(2, 5)))
    ids = torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match=r"ids must be integers \(B, ...\) and G \(B, ..., 5\), B = 2"):
        lm_head.tied_dots(ids, torch.ones(2, 3, 5), H, W, LABELS)
    with pytest.raises(ValueError, match=r"padding_idx must be in \[-7, 7\) or None, got 7"):
        lm_head.tied_dots(ids, torch.ones(2, 4, 5), H, W, LABELS, padding_idx=7)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("lm_head_sqnorms", {0: H[0]}, "h must have 3 dimensions and labels 2"),
        ("lm_head_sqnorms", {2: torch.ones(2)}, "upstream must have the shape of labels"),
        ("lm_head_sqnorms", {3: torch.ones(2, 3).double()}, "lse must have the shape of labels and the type"),
        ("lm_head_sqnorms", {1: LABELS + 7}, "labels must be in"),
        ("lm_head_sqnorms", {7: 2}, "method must be 0, 1 or 3, got 2"),
    ],
)
def test_the_raw_operator_guards_memory(name: str, changed: dict[int, object], message: str) -> None:
    arguments = [H, LABELS, None, None, W, None, -100, 3]
    for index, value in changed.items():
        arguments[index] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.unlearn_kernels, name)(*arguments)


def test_ids_out_of_range_are_refused() -> None:
    for wrong in (-1, 7):
        ids = torch.full((2, 4), wrong)
        with pytest.raises(ValueError, match=r"ids must be in \[0, 7\), got"):
            lm_head.tied_dots(ids, torch.ones(2, 4, 5), H, W, LABELS)


def test_takes_no_part_in_autograd() -> None:
    h, weight = H.clone().requires_grad_(), W.clone().requires_grad_()
    norms = lm_head.sqnorms(h, weight, LABELS)
    assert not norms.requires_grad
    assert not lm_head.weighted_sum(h, weight, LABELS, norms).weight.requires_grad
    assert torch.equal(norms, lm_head.sqnorms(H, W, LABELS))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole(backend: str) -> None:
    torch._dynamo.reset()

    def function(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
        return lm_head.sqnorms(h, W, labels) + lm_head.dots((h, labels), (h, labels), W, summed=True)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for tokens in (3, 5):
        x = case(2, tokens, 5, 7, ignored=False)
        assert torch.equal(compiled(x.h, x.W, x.labels), function(x.h, x.W, x.labels))
    torch._dynamo.reset()


MEASURE = """
import torch
from unlearn_kernels.per_sample import lm_head

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

def tokens(T, d, V):
    return torch.ones(2, T, d), torch.arange(2 * T).view(2, T) % V

def measure(call):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

torch.set_num_threads(2)
T, d, V = 512, 16, 40000
for size in ((8, 4, 16), (T, d, V)):
    (h, labels), W = tokens(*size), torch.ones(size[2], size[1])
    calls = [lambda m=m: lm_head.sqnorms(h, W, labels, method=m) for m in ("direct", "gram")]
    calls += [lambda m=m: lm_head.dots((h, labels), (h, labels), W, method=m) for m in ("direct", "tokens")]
    found = [measure(call) for call in calls]
print(max(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_logits_in_memory() -> None:
    """Logits would take 164 MB; promised are 8 MB of them, two Gram matrices, 1 MB a thread."""
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 20 * 1024

"""The memory promise, and addresses past 2^31 elements."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels.testing import randn
from unlearn_kernels.token_loss import linear_nll

ROOT = Path(__file__).parents[2]

_MEASURE = """
import sys
from pathlib import Path
import torch
from torch.nn import functional as F
from unlearn_kernels.token_loss import linear_kl, linear_nll, npo

def status(key):
    text = Path("/proc/self/status").read_text()
    return int(text.split(key + ":")[1].split()[0]) * 1024

def step(call, N, d, V):
    h, W = torch.zeros(N, d, requires_grad=True), torch.zeros(V, d, requires_grad=True)
    labels, upstream = torch.arange(N) % V, torch.ones(N)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    gradients = torch.autograd.grad(call(h, W, labels), (h, W), upstream)
    return status("VmHWM") - before - sum(4 * g.numel() for g in gradients)

calls = {
    "eager": lambda h, W, y: F.cross_entropy(h @ W.T, y, reduction="none"),
    "kernels": linear_nll,
    "recomputing": lambda h, W, y: linear_nll(h, W, y, memory_budget=0),
    "mean": lambda h, W, y: linear_nll(h, W, y, reduction="mean").expand(len(y)),
    "kl": lambda h, W, y: linear_kl(h, W, (h, W), reduction="mean").expand(len(y)),
    "npo": lambda h, W, y: npo(h.view(4, -1, h.shape[1]), W, y.view(4, -1), torch.zeros(4)).expand(len(y)),
}
call = calls[sys.argv[1]]
step(call, 64, 32, 500)
print(step(call, *map(int, sys.argv[2:])))
"""


def _peak(which: str, N: int = 1024, d: int = 32, V: int = 32000) -> int:
    command = [sys.executable, "-c", _MEASURE, which, *map(str, (N, d, V))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_peak_is_a_tenth_of_eager() -> None:
    eager, ours, logits = _peak("eager"), _peak("recomputing"), 1024 * 32000 * 4
    assert eager > 2 * logits
    assert ours <= eager / 10
    assert _peak("kernels") <= 0.6 * logits


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_a_mean_makes_the_heads_gradient_once() -> None:
    assert _peak("mean", 64, 512, 40000) <= 0.5 * 4 * 512 * 40000


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("loss", "rows", "heads"), [("mean", 128, 1), ("kl", 64, 2), ("npo", 128, 1)])
def test_the_scratch_of_a_sweep(loss: str, rows: int, heads: int) -> None:
    N, d, V = 256, 64, 128_256
    peak, fixed = (
        _peak(loss, N, d, V),
        8 << 20,
    )  # slices of W, a worker's tiles, and what the allocator rounds
    assert peak <= 0.6 * 4 * N * V
    assert peak <= 4 * rows * ((2 + 2 * heads) * d + heads * V + V // 24) + fixed


def _far_rows(rows: int, columns: int, seed: int) -> Tensor:
    """A view whose last row begins past 2^31 elements. Only the pages that it touches exist."""
    gap = 2**31 // (rows - 1) + 5
    storage = torch.empty((rows - 1) * gap + columns, dtype=torch.bfloat16)
    view = storage.as_strided((rows, columns), (gap, 1))
    return view.copy_(randn(rows, columns, dtype=torch.bfloat16, seed=seed))


def test_strides_past_2_31_elements() -> None:
    h, W, labels = _far_rows(5, 6, 0), _far_rows(4, 6, 1), torch.tensor([0, 3, -100, 2, 3])
    near = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in (h, W)]
    far = [x.detach().requires_grad_() for x in (h, W)]
    actual, expected = linear_nll(*far, labels), linear_nll(*near, labels)
    assert torch.equal(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual.sum(), far), torch.autograd.grad(expected.sum(), near), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_more_than_2_31_logits() -> None:
    N, V = 4099, 600_011
    h, W = torch.ones(N, 1), torch.full((1, 1), 0.5).expand(V, 1)
    labels = torch.arange(N) * 100
    nll = linear_nll(h, W, labels)
    torch.testing.assert_close(nll, torch.full((N,), math.log(V)))


def test_small_vocabulary_blocks_cover_every_column() -> None:
    # Enough rows for the narrowest blocks of the backward, and a last block of one column.
    h, W = randn(6000, 4).requires_grad_(), randn(769, 4, seed=1).requires_grad_()
    labels = torch.arange(6000) % 769
    actual = torch.autograd.grad(linear_nll(h, W, labels).mean(), (h, W))
    expected = torch.autograd.grad(F.cross_entropy(h @ W.T, labels), (h, W))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)

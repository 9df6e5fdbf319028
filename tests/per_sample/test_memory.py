"""The scratch that the verbs promise; of `sqnorms`, at most 1 MB on two threads, whatever the shape."""

import subprocess
import sys

import pytest

MEASURE = """
import torch
from unlearn_kernels.per_sample import linear
from unlearn_kernels.testing import randn

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(2)
a, g = torch.ones(4, {tokens}, {d}), torch.ones(4, {tokens}, {p})
small = torch.ones(4, 32, 64)
for method in ("direct", "gram", "auto"):  # threads and code, before the measurement
    linear.sqnorms(small, small, bias=True, method=method)
worst = 0
for method in ("direct", "auto"):
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS")
    linear.sqnorms(a, g, bias=True, method=method)
    worst = max(worst, status("VmHWM") - before)
print(worst)
"""


VERBS = """
import torch
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import TwoSided, linear

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(2)
a, g, w = torch.ones(16, 256, 1024), torch.ones(16, 256, 1024), torch.ones(16)
sides, signs = TwoSided(torch.ones(64, 1024), torch.ones(64, 1024)), Projection(1024 * 1024, 8)
calls = {{
    "dots by tokens": lambda n: linear.dots(a[:n], g[:n], a[:4], g[:4], method="tokens"),
    "dots by gradients": lambda n: linear.dots(a[:n], g[:n], a[:4], g[:4], method="direct"),
    "dots with a sum": lambda n: linear.dots(a[:n], g[:n], a, g, summed=True, method="direct"),
    "weighted sum": lambda n: linear.weighted_sum(a[:n], g[:n], w[:n], bias=True),
    "two-sided": lambda n: linear.project(a[:n], g[:n], sides, bias=True),
    "signs": lambda n: linear.project(a[:n], g[:n], signs),
}}
call = calls[{verb!r}]
call(1)  # threads and code, before the measurement
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
result = call(16)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("verb", "kilobytes"),
    [
        ("dots by tokens", 2800),
        ("dots by gradients", 2800),
        ("dots with a sum", 2800),
        ("weighted sum", 4096 + 1800),
        ("two-sided", 2048),
        ("signs", 16 * 4 * (32768 + 2048) // 1024 + 1500),
    ],
)
def test_scratch_of_verbs(verb: str, kilobytes: int) -> None:
    """What the docstrings promise for two threads, with the result."""
    code = VERBS.format(verb=verb)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= kilobytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("tokens", "d", "p"), [(512, 1024, 1024), (64, 768, 3000)])
def test_scratch(tokens: int, d: int, p: int) -> None:
    code = MEASURE.format(tokens=tokens, d=d, p=p)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 1024

"""The scratch that `sqnorms` promises: at most 1 MB on two threads, whatever the shape."""

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("tokens", "d", "p"), [(512, 1024, 1024), (64, 768, 3000)])
def test_scratch(tokens: int, d: int, p: int) -> None:
    code = MEASURE.format(tokens=tokens, d=d, p=p)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 1024

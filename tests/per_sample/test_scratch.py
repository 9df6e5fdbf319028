"""The scratch that embeddings and normalisation layers promise, whatever the width and the vocabulary."""

import subprocess
import sys

import pytest

MEASURE = """
import torch
from unlearn_kernels.per_sample import embedding, norm

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

torch.set_num_threads(2)
g, x = torch.ones(16, 256, {d}), torch.ones(16, 256, {d})
ids = torch.randint(0, 30000, (16, 256))
images = torch.ones(4, 64, 96, 96)

def work(part):
    embedding.sqnorms(ids[part], g[part], num_embeddings=30000)
    embedding.dots(ids[part], g[part], ids[part], g[part], num_embeddings=30000)
    embedding.dots(ids[part], g[part], ids[part], g[part], num_embeddings=30000, summed=True)
    norm.sqnorms(x[part], g[part], eps=1e-5, bias=True)
    norm.grads(x[part], g[part], eps=1e-5, kind="rms")
    norm.sqnorms(images[part], images[part], eps=1e-5, kind="group", num_groups=8)

work(slice(0, 1))  # threads and code, before the measurement
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
work(slice(None))
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("d", [768, 2048])
def test_scratch(d: int) -> None:
    run = subprocess.run([sys.executable, "-c", MEASURE.format(d=d)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 1024 + d  # kilobytes

"""What needs a fresh process: other instruction sets, and the memory that the kernels promise."""

import os
import subprocess
import sys
import textwrap

import pytest

HASHES = """
    import hashlib, torch
    from unlearn_kernels.influence import Projection, covariance, squared_gradients, squared_rows, topk
    from unlearn_kernels.per_sample import linear
    from unlearn_kernels.testing import randn

    def show(x):
        print(hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest())

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for batch in (1, 5, 9, 33, 70):
            show(Projection(2500, 90, seed=5)(randn(batch, 2500, dtype=dtype)))
    queries, rows = torch.arange(-30.0, 30).reshape(6, 10), torch.arange(3000.0).reshape(300, 10) % 7
    for x in (*topk(queries, rows, 20), *topk(queries.double(), rows.double(), 20, largest=False)):
        show(x)
    whole = torch.arange(9 * 2500.0).reshape(9, 2500) % 11 - 5
    for x in (whole, whole.double()):
        for p in (
            Projection(2500, 64, "sjlt", 5),
            Projection(2500, 64, "srht", 5),
            Projection(2500, 64, "tensorsketch", 5, shape=(50, 50)),
        ):
            show(p(x))
        show(Projection(40, 64, "gaussian", 5)(torch.eye(40, dtype=x.dtype)))
        show(Projection(40, 64, "gaussian", 5).adjoint(torch.eye(64, dtype=x.dtype)))
        a, g = x[:, :600].view(9, 20, 30), x[:, 600:1000].view(9, 20, 20)
        show(linear.project(a, g, Projection(600, 64, "tensorsketch", 5, shape=(20, 30))))
        for y in (squared_gradients(a, g), covariance(x), squared_rows(x)):
            show(y)
    codes, scales = torch.arange(5 * 300).view(5, 300) * 7919 % 16383 - 8191, torch.ones(5)
    rows, ones = (torch.arange(200 * 300).view(200, 300) * 31 % 256).byte(), torch.ones(200, 3)
    for nibbles in (False, True):
        for x in torch.ops.unlearn_kernels.scan_codes(codes.short(), scales, rows, ones, 128, 20, nibbles, 3):
            show(x)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for bits in (0, 4, 8, 16, 32):
            for x in torch.ops.unlearn_kernels.encode_rows(randn(9, 301, dtype=dtype), bits, 6, bits > 4, 5, 7):
                show(x.view(torch.uint8))
    print(torch.ops.unlearn_kernels.isa())
"""

PEAK = """
    import torch
    from unlearn_kernels.influence import Projection, topk

    def peak():
        return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])

    def extra(call):
        call()  # threads and code are in memory
        open("/proc/self/clear_refs", "w").write("5")
        before = peak()
        result = call()
        return peak() - before

    torch.set_num_threads(2)
    g = torch.ones(64, 300_000)
    p = Projection(g.shape[1], 1024)
    print(extra(lambda: p(g)))
    queries, rows = torch.ones(500, 16), torch.ones(100_000, 16)
    print(extra(lambda: topk(queries, rows, 100)))
"""


def run(script: str, **environment: str) -> list[str]:
    command = [sys.executable, "-c", textwrap.dedent(script)]
    env = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_every_isa_gives_the_same_bits() -> None:
    """Float sketches are additions in one order; the products here are whole numbers, exact in any."""
    host = pytest.importorskip("unlearn_kernels._host")
    variants = [isa for isa, runs in host.isa_variants().items() if runs]
    *expected, isa = run(HASHES, UNLEARN_KERNELS_ISA="baseline")
    assert isa == "baseline"
    for variant in variants:
        *got, isa = run(HASHES, UNLEARN_KERNELS_ISA=variant)
        assert isa == variant
        assert got == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's memory accounting")
def test_memory_promises() -> None:
    """1 MB is what the allocator may round up; the matrix would take 1.2 GB, the scores 200 MB."""
    megabyte = 1 << 20
    sketch, search = map(int, run(PEAK))
    threads = 2
    assert sketch <= threads * 512 * 1024 + 64 * 1024 * 4 + megabyte
    assert search <= threads * (512 * 1024 + 16 * 224 * 100) + 500 * 100 * 12 + megabyte

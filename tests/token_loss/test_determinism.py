"""The same bits at every number of threads; every ISA variant as exact as the reference."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unlearn_kernels.testing import at_threads, randn
from unlearn_kernels.token_loss import linear_nll

MakeHead = Callable[..., Any]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_threads_do_not_change_a_bit(head: MakeHead, dtype: torch.dtype) -> None:
    x = head((2, 401), 129, 3001, dtype)

    def run() -> list[Tensor]:
        leaves = x.leaves()
        nll = linear_nll(*leaves[:2], x.labels, bias=leaves[2])
        return [nll.detach(), *torch.autograd.grad(nll, leaves, randn(2, 401, seed=4).to(nll.dtype))]

    one, *others = at_threads((1, 2, 4), run)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_variant_is_exact(isa: str) -> None:
    host = pytest.importorskip("unlearn_kernels._host")
    if not host.can_run(isa):
        pytest.skip(f"this processor cannot run {isa}")
    tests = [
        str(ROOT / "tests/token_loss/test_linear_nll.py"),
        "-k",
        "shapes or dtypes or infinite or large or strides",
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"UNLEARN_KERNELS_ISA": isa, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout

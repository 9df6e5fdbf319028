"""The 512-bit shapes of the engine, on any processor: other micro-tiles, strips and blocks than AVX2's."""

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference.per_sample.linear import linear_sqnorms
from unlearn_kernels.testing import assert_as_exact_as, randn

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
# Around the strips (14 x 32, 14 x 16 in double), the row block (112) and the depth block (192).
SIZES = [
    (1, 1, 1),
    (14, 32, 192),
    (15, 33, 193),
    (13, 31, 191),
    (113, 65, 385),
    (5, 300, 7),
    (230, 3, 50),
    (3, 4, 0),
]

pytestmark = [
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no C++ compiler"),
    pytest.mark.skipif(not CSRC.is_dir(), reason="no C++ sources"),
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("wide") / "wide.so"
    options = ["-std=c++17", "-O1", "-g0", "-w", "-ffp-contract=off", "-shared", "-fPIC", f"-I{CSRC}"]
    source = Path(__file__).with_name("wide.cpp")
    subprocess.run([*COMPILER, *options, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def strides(x: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * x.dim())(*x.stride())


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def wide_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul(engine: ctypes.CDLL, a: Tensor, b: Tensor, pairs: bool = False) -> Tensor:
    sizes = [ctypes.c_int64(n) for n in (a.shape[0], b.shape[0], a.shape[1])]
    out = torch.full((a.shape[0], b.shape[0]), torch.nan, dtype=wide_type(a))
    code, flag = ctypes.c_int(CODES[a.dtype]), ctypes.c_bool(pairs)
    engine.wide_matmul(address(a), strides(a), address(b), strides(b), code, flag, *sizes, address(out))
    return out


def check_matmul(a: Tensor, b: Tensor, result: Tensor) -> None:
    wide = wide_type(a)
    assert_as_exact_as("product", result, a.double() @ b.double().T, a.to(wide) @ b.to(wide).T)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matmul(engine: ctypes.CDLL, size: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, n, k = size
    a, b = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1)
    check_matmul(a, b, matmul(engine, a, b))
    x, y = a.T.contiguous().T, b.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(matmul(engine, x, y), matmul(engine, a, b))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_matmul_in_pairs_of_bf16(engine: ctypes.CDLL, size: tuple[int, int, int]) -> None:
    m, n, k = size
    a, b = randn(m, k, dtype=torch.bfloat16), randn(n, k, dtype=torch.bfloat16, seed=1)
    check_matmul(a, b, matmul(engine, a, b, pairs=True))
    x, y = a.T.contiguous().T, b.repeat_interleave(2, 1)[:, ::2]
    assert torch.equal(matmul(engine, x, y, pairs=True), matmul(engine, a, b, pairs=True))


def test_pairs_round_no_more_than_single_steps(engine: ctypes.CDLL) -> None:
    x = randn(20, 1000, dtype=torch.bfloat16)  # sums of squares: roundings of one sign
    pairs, steps = (matmul(engine, x, x, pairs=pairs).diagonal() for pairs in (True, False))
    assert_as_exact_as("squares", pairs, x.double().square().sum(1), steps, floor=0)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("method", [0, 1, 3])
@pytest.mark.parametrize("size", [(5, 7, 3), (33, 65, 15), (200, 17, 130)], ids=str)
def test_norms(engine: ctypes.CDLL, size: tuple[int, int, int], method: int, dtype: torch.dtype) -> None:
    tokens, inputs, outputs = size
    a, g = randn(2, tokens, inputs, dtype=dtype), randn(2, tokens, outputs, dtype=dtype, seed=1)
    out = torch.full((2,), torch.nan, dtype=wide_type(a))
    sizes = [ctypes.c_int64(n) for n in (2, *size)]
    codes = ctypes.c_int(CODES[dtype]), ctypes.c_int(method)
    engine.wide_norms(
        address(a), strides(a), address(g), strides(g), codes[0], *sizes, codes[1], address(out)
    )
    x, y = a.to(wide_type(a)), g.to(wide_type(a))
    eager = linear_sqnorms(x, y, True, 0) if method == 0 else ((x @ x.mT + 1) * (y @ y.mT)).sum((1, 2))
    assert_as_exact_as("norms", out, linear_sqnorms(a.double(), g.double(), True, 0), eager)

"""The GEMM core by itself: C = A Bᵀ, so that what fusion gains can be told from what the core gains."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing


class Operands(NamedTuple):
    """A (M, K) and B (N, K)."""

    a: Tensor
    b: Tensor


def _make(m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[str], Operands]:
    def make(device: str) -> Operands:
        return Operands(
            testing.randn(m, k, dtype=dtype, seed=1, device=device),
            testing.randn(n, k, dtype=dtype, seed=2, device=device),
        )

    return make


def _warm(run: Callable[[], Tensor]) -> Call:
    """Calls once before it is timed: OpenMP's workers of another provider spin for some ms after their work, on
    the cores that the test door's own threads need."""
    return Call(run, reset=run)


def _ours(inputs: Operands) -> Call:
    from unlearn_kernels import _host

    threads = torch.get_num_threads()
    a, b = ((t.view(torch.uint16) if t.dtype == torch.bfloat16 else t).numpy() for t in inputs)
    return _warm(lambda: torch.from_numpy(_host.matmul(a, b, threads=threads)))


def _torch_mm(inputs: Operands) -> Call:
    return _warm(lambda: inputs.a @ inputs.b.T)


def _onednn(inputs: Operands) -> Call:
    linear = torch.ops.mkldnn._linear_pointwise
    return _warm(lambda: linear(inputs.a, inputs.b, None, "none", [], ""))


def _onednn_packed(inputs: Operands) -> Call:
    packed = torch.ops.mkldnn._reorder_linear_weight(inputs.b, len(inputs.a))
    linear = torch.ops.mkldnn._linear_pointwise
    return _warm(lambda: linear(inputs.a, packed, None, "none", [], ""))


_PROVIDERS = (
    Provider("unlearn_kernels", _ours, "ours", devices=("cpu",)),
    Provider("torch.mm", _torch_mm, "plain"),
    Provider("oneDNN linear", _onednn, devices=("cpu",)),
    Provider("oneDNN linear, weight packed before", _onednn_packed, devices=("cpu",)),
)


def _case(m: int, n: int, k: int, dtype: torch.dtype, label: str, warm: Case | None) -> Case:
    half = dtype != torch.float32
    return register(
        Case(
            f"tile_engine.gemm/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(),
            shape=f"{m} x {n} x {k}",
            dtype=dtype,
            flops=2 * m * n * k,
            bytes=(m * k + n * k) * dtype.itemsize + 4 * m * n,
            make=_make(m, n, k, dtype),
            reference=lambda inputs: inputs.a.double() @ inputs.b.double().T,
            error=lambda _, output, reference: testing.relative_error(output, reference),
            providers=_PROVIDERS,
            bound=1e-5 if half else 1e-6,
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    _small = _case(192, 256, 512, _dtype, "small", None)
    _case(1024, 1024, 1024, _dtype, "1024", _small)
    _case(512, 1024, 1024, _dtype, "512", _small)

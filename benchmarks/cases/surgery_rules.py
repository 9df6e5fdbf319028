"""Whole steps by a rule on the Gramian of K gradients: inner products, weights, combination."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Sets, Shapes, deviation, elements, gpt2, gpt2_half, lora, sd15_kv
from benchmarks.peers import torchjd
from benchmarks.registry import Call, Case, Provider, register


def _ours(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    def run() -> list[Tensor]:
        weights = surgery.weights(surgery.gramian(inputs.in_place), "mgda")
        surgery.combine_(inputs.in_place, weights)
        return inputs.work

    return Call(run, inputs.restore)


def _torchjd(name: str, *, gramian_option: bool) -> Provider:
    def build(inputs: Sets) -> Call:
        return Call(*torchjd.aggregation(inputs.stacks, "MGDA", gramian_option=gramian_option))

    return Provider(name, build, requires=("torchjd",))


_PROVIDERS = (
    Provider("unlearn_kernels", _ours, "ours"),
    _torchjd("torchjd MGDA", gramian_option=False),
    _torchjd("torchjd MGDA, Gramian option", gramian_option=True),
)


def _error(inputs: Sets, output: list[Tensor], gramian: Tensor) -> float:
    from unlearn_kernels import surgery

    return deviation(inputs, output, surgery.weights(gramian, "mgda"))


def _case(label: str, shapes: Shapes, K: int, dtype: torch.dtype, warm: Case | None) -> Case:
    n, pairs = elements(shapes), K * (K + 1) // 2
    return register(
        Case(
            f"surgery.mgda/{label}/K{K}/{str(dtype).removeprefix('torch.')}",
            ops=("gramian", "combine"),
            shape=f"K {K}, {len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=2 * (pairs + K) * n,
            bytes=(2 * K + 1) * n * dtype.itemsize,
            make=gradient_sets.make(shapes, K, dtype),
            reference=gradient_sets.gramian,
            error=_error,
            providers=_PROVIDERS,
            bound=1e-6 if dtype == torch.float32 else 2.0**-8,
            peer_bound=5e-2,
            bandwidth="axpy",
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    for _K in (2, 4):
        _small = _case("small", gpt2(2048, 128, 2, 128), _K, _dtype, None)
        _case("sd15-kv", sd15_kv(), _K, _dtype, _small)
        _case("lora-llama2-7b", lora(), _K, _dtype, _small)
        _case("gpt2-half", gpt2_half(), _K, _dtype, _small)

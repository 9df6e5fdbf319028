"""Squared per-sample gradient norms of linear layers, weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import elementwise
from benchmarks.peers import opacus
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing


class Layer(NamedTuple):
    """Activations A (B, T, d), output gradients G (B, T, p), and what a plain backward needs."""

    A: Tensor
    G: Tensor
    weight: Tensor
    bias: Tensor


def _make(B: int, T: int, d: int, p: int, dtype: torch.dtype) -> Callable[[str], Layer]:
    def make(device: str) -> Layer:
        shapes = ((B, T, d), (B, T, p), (p, d), (p,))
        drawn = (testing.randn(*s, dtype=dtype, seed=i, device=device) for i, s in enumerate(shapes))
        return Layer(*drawn)

    return make


def gram(A: Tensor, G: Tensor) -> Tensor:
    """Σ_ts (a_t·a_s)(g_t·g_s) + |Σ_t g_t|²."""
    weight = ((A @ A.mT) * (G @ G.mT)).sum((1, 2))
    return weight + G.sum(1).square().sum(1)


def materialise(A: Tensor, G: Tensor) -> Tensor:
    """|G_iᵀA_i|² + |Σ_t g_t|² from all the gradients at once."""
    return torch.einsum("btp,btd->bpd", G, A).square().sum((1, 2)) + G.sum(1).square().sum(1)


def _reference(inputs: Layer) -> Tensor:
    pairs = zip(inputs.A, inputs.G, strict=True)
    return torch.stack([materialise(a[None].double(), g[None].double())[0] for a, g in pairs])


def _ours(inputs: Layer) -> Call:
    from unlearn_kernels.per_sample import linear

    return Call(lambda: linear.sqnorms(inputs.A, inputs.G, bias=True))


def _plain(inputs: Layer) -> Call:
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.A, inputs.weight, inputs.bias))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.linear(*leaves), leaves, inputs.G)

    return Call(run)


def _cheaper(inputs: Layer) -> Callable[[Tensor, Tensor], Tensor]:
    T, d, p = inputs.A.shape[1], inputs.A.shape[2], inputs.G.shape[2]
    return gram if T * (d + p) <= d * p else materialise


def _compiled(inputs: Layer) -> Call:
    function = compiled(_cheaper(inputs))
    return Call(lambda: function(inputs.A, inputs.G))


_PROVIDERS = (
    Provider("unlearn_kernels", _ours, "ours"),
    Provider("plain forward+backward", _plain, "plain", yardstick=True),
    Provider("opacus ghost", lambda x: Call(opacus.ghost_sqnorms(x.A, x.G)), requires=("opacus",)),
    Provider(
        "opacus materialise", lambda x: Call(opacus.materialised_sqnorms(x.A, x.G)), requires=("opacus",)
    ),
    Provider("torch Gram", lambda x: Call(lambda: gram(x.A, x.G))),
    Provider("torch einsum", lambda x: Call(lambda: materialise(x.A, x.G))),
    Provider("torch.compile", _compiled, compiled=True),
)


def least_flops(B: int, T: int, d: int, p: int) -> int:
    """The cheapest of the direct product, the symmetric half of the Gram form, and |a|²|g|² when T is 1."""
    return 2 * B * (d + p) if T == 1 else min(2 * B * T * d * p, B * T * (T + 1) * (d + p))


def _case(label: str, B: int, T: int, d: int, p: int, dtype: torch.dtype, warm: Case | None) -> Case:
    return register(
        Case(
            f"per_sample.linear.sqnorms/{label}/{str(dtype).removeprefix('torch.')}",
            ops=("linear_sqnorms",),
            shape=f"B {B}, T {T}, d {d}, p {p}",
            dtype=dtype,
            flops=least_flops(B, T, d, p),
            bytes=B * T * (d + p) * dtype.itemsize,
            make=_make(B, T, d, p, dtype),
            reference=_reference,
            error=lambda _, output, reference: elementwise(output, reference),
            providers=_PROVIDERS,
            bound=1e-6 if dtype == torch.float32 else 1e-5,
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16, torch.float16):
    _small = _case("small", 8, 128, 256, 384, _dtype, None)
    _case("L1", 16, 512, 1024, 1024, _dtype, _small)
    if _dtype == torch.float32:
        _case("L2", 8, 1024, 1024, 4096, _dtype, _small)
        _case("L3", 64, 64, 768, 768, _dtype, _small)
        _case("L4", 256, 1, 1024, 1024, _dtype, _case("small-T1", 16, 1, 128, 96, _dtype, None))

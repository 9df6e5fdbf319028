"""Squared per-sample gradient norms of normalisation layers, straight and from the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.accuracy import elementwise
from benchmarks.peers import opacus
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing
from unlearn_kernels.reference.per_sample import norm as formulas


class Layer(NamedTuple):
    """The module, its inputs X, output gradients G, and what the kernels are told of it."""

    module: nn.Module
    X: Tensor
    G: Tensor
    options: dict[str, Any]

    @property
    def raw(self) -> tuple[int, int, float, bool]:
        """Kind, groups, eps and bias as the reference takes them."""
        code = {"layer": formulas.LAYER, "rms": formulas.RMS, "group": formulas.GROUP}[self.options["kind"]]
        return code, self.options.get("num_groups", 1), self.options["eps"], self.options["bias"]


_EPS = 1e-5
_MODULES: dict[str, Callable[[int], nn.Module]] = {
    "layer": lambda d: nn.LayerNorm(d, eps=_EPS),
    "rms": lambda d: nn.RMSNorm(d, eps=_EPS),
    "group": lambda channels: nn.GroupNorm(32, channels, eps=_EPS),
}


def _make(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[str], Layer]:
    def make(device: str) -> Layer:
        X, G = (testing.randn(*shape, dtype=dtype, seed=i, device=device) for i in (0, 1))
        module = _MODULES[kind](shape[1] if kind == "group" else shape[-1]).to(device, dtype)
        options = {"kind": kind, "eps": _EPS, "bias": kind != "rms"}
        return Layer(module, X, G, options | ({"num_groups": 32} if kind == "group" else {}))

    return make


def _reference(inputs: Layer) -> Tensor:
    return torch.cat(
        [
            formulas.norm_sqnorms(x.double(), g.double(), *inputs.raw)
            for x, g in zip(inputs.X.flatten(2).split(1), inputs.G.flatten(2).split(1), strict=True)
        ]
    )


def _ours(inputs: Layer) -> Call:
    from unlearn_kernels.per_sample import norm

    return Call(lambda: norm.sqnorms(inputs.X, inputs.G, **inputs.options))


def _grads(inputs: Layer) -> Call:
    from unlearn_kernels.per_sample import norm

    def run() -> Tensor:
        weight, bias = norm.grads(inputs.X, inputs.G, **inputs.options)
        norms = weight.square().sum(1)
        return norms if bias is None else norms + bias.square().sum(1)

    return Call(run)


def _plain(inputs: Layer) -> Call:
    X = inputs.X.detach().requires_grad_()
    leaves = (X, *inputs.module.parameters())
    return Call(lambda: torch.autograd.grad(inputs.module(X), leaves, inputs.G))


def _compiled(inputs: Layer) -> Call:
    function = compiled(lambda x, g: formulas.norm_sqnorms(x.flatten(2), g.flatten(2), *inputs.raw))
    return Call(lambda: function(inputs.X, inputs.G))


def _stream(inputs: Layer) -> Call:
    return Call(lambda: torch.dot(inputs.X.view(-1), inputs.G.view(-1)))


def _opacus(inputs: Layer) -> Call:
    return Call(opacus.norm_sqnorms(inputs.module, inputs.X, inputs.G))


_PEERS = (
    Provider("plain forward+backward", _plain, "plain", yardstick=True),
    Provider("stream X and G once", _stream, "plain", yardstick=True),
    Provider("opacus", _opacus, requires=("opacus",)),
    Provider("torch.compile", _compiled, compiled=True),
)
_OURS = {"sqnorms": _ours, "grads": _grads}


def _case(
    verb: str, kind: str, label: str, shape: tuple[int, ...], dtype: torch.dtype, warm: Case | None
) -> Case:
    elements = torch.Size(shape).numel()
    return register(
        Case(
            f"per_sample.norm.{verb}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(f"norm_{verb}",),
            shape=f"{kind}, {' x '.join(map(str, shape))}",
            dtype=dtype,
            flops=8 * elements,
            bytes=2 * elements * dtype.itemsize,
            make=_make(kind, shape, dtype),
            reference=_reference,
            error=lambda _, got, expected: elementwise(got, expected),
            providers=(Provider("unlearn_kernels", _OURS[verb], "ours"), *_PEERS),
            bound=1e-6,
            warm=warm,
        )
    )


_TOKENS, _IMAGES = (16, 512, 1024), (8, 320, 64, 64)
_FEW_TOKENS, _FEW_IMAGES = (4, 32, 64), (4, 64, 8, 8)

for _dtype in (torch.float32, torch.bfloat16):
    _small = _case("sqnorms", "layer", "small", _FEW_TOKENS, _dtype, None)
    _case("sqnorms", "layer", "layer", _TOKENS, _dtype, _small)
    _case(
        "sqnorms",
        "rms",
        "rms",
        _TOKENS,
        _dtype,
        _case("sqnorms", "rms", "small-rms", _FEW_TOKENS, _dtype, None),
    )
_small = _case("sqnorms", "group", "small-group", _FEW_IMAGES, torch.float32, None)
_case("sqnorms", "group", "group", _IMAGES, torch.float32, _small)
_small = _case("grads", "layer", "small", _FEW_TOKENS, torch.float32, None)
_case("grads", "layer", "layer", _TOKENS, torch.float32, _small)

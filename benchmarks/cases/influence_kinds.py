"""Kinds of projection other than signs, and their transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.influence import Gradients
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing


class Layer(NamedTuple):
    """Inputs (B, T, d) and gradients at the outputs (B, T, p) of a linear layer, and the size to project to."""

    a: Tensor
    g: Tensor
    k: int


def _projection(kind: str, inputs: Gradients) -> Any:
    from unlearn_kernels import influence

    return influence.Projection(inputs.g.shape[1], inputs.k, kind)


def _gradients(B: int, dim: int, k: int) -> Callable[[str], Gradients]:
    return lambda device: Gradients(testing.randn(B, dim, device=device), k)


def _error(_: object, output: Tensor, reference: Tensor | None) -> float:
    return 0.0 if reference is None else testing.relative_error(output, reference)


def _dense(inputs: Gradients) -> Call:
    matrix = testing.randn(inputs.g.shape[1], inputs.k, seed=3, device=inputs.g.device.type) * inputs.k**-0.5
    return Call(lambda: inputs.g @ matrix)


def _index_add(inputs: Gradients) -> Call:
    """CountSketch with tables of outputs and signs, 9 bytes a coordinate."""
    place = torch.randint(0, inputs.k, (inputs.g.shape[1],), device=inputs.g.device)
    sign = torch.randint(0, 2, (inputs.g.shape[1],), device=inputs.g.device).to(torch.int8) * 2 - 1

    def run() -> Tensor:
        return inputs.g.new_zeros(len(inputs.g), inputs.k).index_add_(1, place, inputs.g * sign)

    return Call(run)


def _distortion(inputs: Gradients, output: Tensor, _: Tensor | None) -> float:
    true = inputs.g.double().square().sum(1)
    return float((output.double().square().sum(1) / true - 1).abs().max())


def _kind(kind: str, op: str, B: int, dim: int, k: int, label: str, flops: int, warm: Case | None) -> Case:
    bound = 5 * (2 / k) ** 0.5
    providers = [Provider("unlearn_kernels", lambda x: Call(lambda: _projection(kind, x)(x.g)), "ours")]
    if kind == "gaussian" and dim < 1 << 16:
        providers.append(
            Provider("torch.mm, matrix in memory before", _dense, "plain", error=_distortion, bound=bound)
        )
    if kind == "sjlt":
        providers.append(
            Provider("index_add_, tables before", _index_add, "plain", error=_distortion, bound=bound)
        )
    return register(
        Case(
            f"influence.Projection-{kind}/{label}/float32",
            ops=(op,),
            shape=f"{B} x {dim} -> {k}",
            dtype=torch.float32,
            flops=flops,
            bytes=B * dim * 4,
            make=_gradients(B, dim, k),
            reference=lambda x: _projection(kind, x)(x.g.double().cpu()),
            error=_error,
            providers=tuple(providers),
            bound=1e-6,
            threads=1,
            warm=warm,
        )
    )


def _adjoint(B: int, dim: int, k: int) -> Case:
    def transposed(x: Gradients) -> Tensor:
        return _projection("gaussian", x).adjoint(x.g[:, : x.k])

    return register(
        Case(
            "influence.Projection.adjoint/small/float32",
            ops=("dense_adjoint",),
            shape=f"{B} x {k} -> {dim}",
            dtype=torch.float32,
            flops=2 * B * dim * k,
            bytes=B * dim * 4,
            make=_gradients(B, dim, k),
            reference=lambda x: transposed(x._replace(g=x.g.double().cpu())),
            error=_error,
            providers=(Provider("unlearn_kernels", lambda x: Call(lambda: transposed(x)), "ours"),),
            bound=1e-6,
            threads=1,
        )
    )


def _sketch(x: Layer) -> Tensor:
    from unlearn_kernels import influence
    from unlearn_kernels.per_sample import linear

    shape = x.g.shape[2], x.a.shape[2]
    return linear.project(
        x.a, x.g, influence.Projection(shape[0] * shape[1], x.k, "tensorsketch", shape=shape)
    )


def _materialised(x: Layer) -> Call:
    from unlearn_kernels import influence

    shape = x.g.shape[2], x.a.shape[2]
    project = influence.Projection(shape[0] * shape[1], x.k, "tensorsketch", shape=shape)
    return Call(lambda: project((x.g.mT @ x.a).flatten(1)))


def _layer(B: int, T: int, d: int, p: int, k: int, label: str, warm: Case | None) -> Case:
    return register(
        Case(
            f"influence.tensor_sketch/{label}/float32",
            ops=("tensor_sketch",),
            shape=f"{B} x {T}, {d} -> {p}, to {k}",
            dtype=torch.float32,
            flops=B * T * (d + p + k * (2 * (k.bit_length() - 1) + 2)),
            bytes=4 * B * T * (d + p),
            make=lambda device: Layer(
                testing.randn(B, T, d, device=device), testing.randn(B, T, p, seed=1, device=device), k
            ),
            reference=lambda x: _sketch(x._replace(a=x.a.double().cpu(), g=x.g.double().cpu())),
            error=_error,
            providers=(
                Provider("unlearn_kernels", lambda x: Call(lambda: _sketch(x)), "ours"),
                Provider("gradients, then hashed", _materialised, "plain"),
            ),
            bound=2e-6,
            threads=1,
            warm=warm,
        )
    )


for _name, _op, _flops in (
    ("gaussian", "normal_project", lambda B, dim, k: 2 * B * dim * k),
    ("sjlt", "sparse_project", lambda B, dim, k: 2 * B * dim),
    ("srht", "hadamard_project", lambda B, dim, k: 12 * B * dim),
):
    _small = _kind(_name, _op, 8, 8192, 256, "small", _flops(8, 8192, 256), None)
    _kind(_name, _op, 32, 1_000_000, 512, "1M-to-512", _flops(32, 1_000_000, 512), _small)
_adjoint(8, 8192, 256)
_small_layer = _layer(4, 16, 64, 64, 256, "small", None)
_layer(16, 128, 256, 1024, 1024, "16x128", _small_layer)

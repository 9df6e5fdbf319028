"""Gradients projected out of a subspace, by its basis and by a dense projector."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Shapes, elements, sd15_kv
from benchmarks.registry import Call, Case, Provider, register

_RANK = 16


class Layers(NamedTuple):
    """Gradients of layers, an orthonormal basis for each, and a copy to work on."""

    gradients: list[Tensor]
    bases: list[Tensor]
    work: list[Tensor]


def _layers(shapes: Shapes, dtype: torch.dtype) -> Callable[[str], Layers]:
    def on(device: str) -> Layers:
        (gradients,) = gradient_sets.make(shapes, 1, dtype)(device).sets
        generator = torch.Generator(device).manual_seed(1)
        draws = [torch.randn(x.shape[1], _RANK, generator=generator, device=device) for x in gradients]
        return Layers(gradients, [torch.linalg.qr(x).Q for x in draws], [x.clone() for x in gradients])

    return on


def _projecting(project: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[[Layers], Call]:
    def build(inputs: Layers) -> Call:
        def run() -> list[Tensor]:
            project(inputs.work, inputs.bases)
            return inputs.work

        return Call(run, lambda: torch._foreach_copy_(inputs.work, inputs.gradients))

    return build


def _project_out(gradients: list[Tensor], bases: list[Tensor]) -> None:
    from unlearn_kernels import surgery

    surgery.project_out_(gradients, bases)


def _outside_error(inputs: Layers, output: list[Tensor], _: None) -> float:
    off = size = 0.0
    for got, g, M in zip(output, inputs.gradients, inputs.bases, strict=True):
        expected = g.double() - (g.double() @ M.double()) @ M.double().T
        off += float((got.double() - expected).square().sum())
        size += float(expected.square().sum())
    return (off / size) ** 0.5


def _dense(inputs: Layers) -> Call:
    projectors = [(M @ M.T).to(g.dtype) for M, g in zip(inputs.bases, inputs.gradients, strict=True)]

    def project(gradients: list[Tensor], _: list[Tensor]) -> None:
        for g, P in zip(gradients, projectors, strict=True):
            g.sub_(g @ P)

    return _projecting(project)(inputs)


def _case(label: str, shapes: Shapes, dtype: torch.dtype, warm: Case | None) -> Case:
    n = elements(shapes)
    return register(
        Case(
            f"surgery.project_out/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(),
            shape=f"rank {_RANK}, {len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=4 * _RANK * n,
            bytes=3 * n * dtype.itemsize,
            make=_layers(shapes, dtype),
            reference=lambda inputs: None,
            error=_outside_error,
            providers=(
                Provider("unlearn_kernels", _projecting(_project_out), "ours"),
                Provider("dense projector, made before", _dense, "plain"),
            ),
            bound=1e-6 if dtype == torch.float32 else 2.0**-8,
            peer_bound=5e-2,
            bandwidth="axpy",
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    _small = _case("small", ((128, 128), (512, 128)), _dtype, None)
    _case("sd15-kv", sd15_kv(), _dtype, _small)

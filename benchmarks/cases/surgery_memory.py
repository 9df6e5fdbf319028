"""Retain gradients that are kept: in 8 bits, or several in Adam's metric."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Sets, Shapes, deviation, elements, gpt2, lora, sd15_kv
from benchmarks.peers import plain_surgery
from benchmarks.registry import Call, Case, Provider, Role, register

_EPS = 1e-2
Build = Callable[[Sets], Call]
Error = Callable[[Sets, list[Tensor], None], float]


class _Work(NamedTuple):
    op: str
    sets: int
    flops: int  # of an element
    bytes: float  # of an element, in elements, besides codes
    codes: int  # bytes of codes, of an element
    ours: Build
    plain: tuple[str, Build]
    error: Error
    bound: float | None = None  # where it is not the rounding of the result


def _compress(inputs: Sets) -> Call:
    from unlearn_kernels.surgery import CompressedGradient

    return Call(lambda: CompressedGradient(inputs.sets[0]).codes)


def _codes_error(inputs: Sets, output: list[Tensor], _: None) -> float:
    """The share of codes that differ: a quotient near a half may be rounded either way."""
    pairs = zip(output, plain_surgery.compress(inputs.sets[0])[0], strict=True)
    return sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a in output)


def _decompress(inputs: Sets) -> Call:
    from unlearn_kernels.surgery import CompressedGradient

    kept = CompressedGradient(inputs.sets[0])
    dtype = inputs.sets[0][0].dtype
    return Call(lambda: kept.decompress(dtype))


def _plain_decompress(inputs: Sets) -> Call:
    codes, scales = plain_surgery.compress(inputs.sets[0])
    dtype = inputs.sets[0][0].dtype
    return Call(lambda: [x.to(dtype) for x in plain_surgery.decompressed(codes, scales)])


def _decompressed_error(inputs: Sets, output: list[Tensor], _: None) -> float:
    expected = plain_surgery.decompressed(*plain_surgery.compress(inputs.sets[0]))
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(output, expected, strict=True))
    return (off / sum(float(b.double().square().sum()) for b in expected)) ** 0.5


def _project(inputs: Sets) -> Call:
    from unlearn_kernels.surgery import CompressedGradient

    kept = CompressedGradient(inputs.sets[1])

    def run() -> list[Tensor]:
        kept.project_conflict_(inputs.work)
        return inputs.work

    return Call(run, inputs.restore)


def _plain_project(inputs: Sets) -> Call:
    kept = plain_surgery.compress(inputs.sets[1])

    def run() -> list[Tensor]:
        dtype = inputs.work[0].dtype
        retain = [x.to(dtype) for x in plain_surgery.decompressed(*kept)]
        plain_surgery.project_by_foreach(inputs.work, retain)
        return inputs.work

    return Call(run, inputs.restore)


def _projected_error(inputs: Sets, output: list[Tensor], _: None) -> float:
    retain = plain_surgery.decompressed(*plain_surgery.compress(inputs.sets[1]))
    pair = Sets([inputs.sets[0], retain])
    gramian = gradient_sets.gramian(pair)
    return deviation(
        pair, output, torch.stack((torch.ones_like(gramian[0, 0]), -gramian[0, 1] / gramian[1, 1]))
    )


def _seconds(inputs: Sets) -> list[Tensor]:
    return [x.square() for x in inputs.sets[-1]]


def _weighted(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    sets, seconds = inputs.sets[:-1], _seconds(inputs)
    return Call(lambda: [surgery.weighted_gramian(sets, seconds, eps=_EPS)])


def _plain_weighted(inputs: Sets) -> Call:
    sets, seconds = inputs.sets[:-1], _seconds(inputs)

    def run() -> list[Tensor]:
        roots = torch._foreach_sqrt(seconds)
        torch._foreach_add_(roots, _EPS)
        torch._foreach_sqrt_(roots)  # half of the metric to either factor
        return [plain_surgery.gramian_by_foreach([torch._foreach_div(x, roots) for x in sets])]

    return Call(run)


def _weighted_error(inputs: Sets, output: list[Tensor], _: None) -> float:
    total = torch.zeros(len(inputs.sets) - 1, len(inputs.sets) - 1, dtype=torch.float64)
    for *rows, v in zip(*inputs.sets[:-1], _seconds(inputs), strict=True):
        metric = 1 / (v.double().sqrt() + _EPS)
        g = torch.stack([x.double().reshape(-1) for x in rows])
        total += (g * metric.reshape(-1)) @ g.T
    size = total.diagonal().sqrt()
    return float(((output[0] - total).abs() / torch.outer(size, size)).max())


_WORK = (
    _Work(
        "compress", 1, 3, 1, 1, _compress,
        ("torch by blocks", lambda x: Call(lambda: plain_surgery.compress(x.sets[0])[0])), _codes_error, 1e-3,
    ),
    _Work(
        "decompress", 1, 1, 1, 1, _decompress, ("torch by blocks", _plain_decompress), _decompressed_error,
    ),
    _Work(
        "project_conflict_compressed", 2, 10, 3, 2, _project,
        ("torch by blocks, then _foreach", _plain_project), _projected_error,
    ),
    _Work(
        "weighted_gramian", 3, 9, 3, 0, _weighted, ("torch._foreach", _plain_weighted), _weighted_error, 1e-6,
    ),
)  # fmt: skip


def _case(work: _Work, label: str, shapes: Shapes, dtype: torch.dtype, warm: Case | None) -> Case:
    n, rounding = elements(shapes), 1e-6 if dtype == torch.float32 else 2.0**-8
    roles: tuple[Role, Role] = ("ours", "plain")
    builds = (("unlearn_kernels", work.ours), work.plain)
    return register(
        Case(
            f"surgery.{work.op}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(work.op,),
            shape=f"{len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=work.flops * n,
            bytes=int((work.bytes * dtype.itemsize + work.codes) * n),
            make=gradient_sets.make(shapes, work.sets, dtype),
            reference=lambda inputs: None,
            error=work.error,
            providers=tuple(Provider(*build, role) for build, role in zip(builds, roles, strict=True)),
            bound=work.bound or rounding,
            peer_bound=5e-2,
            bandwidth="read" if work.op == "weighted_gramian" else "axpy",
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    for _work in _WORK:
        _small = _case(_work, "small", gpt2(2048, 128, 2, 128), _dtype, None)
        _case(_work, "sd15-kv", sd15_kv(), _dtype, _small)
        _case(_work, "lora-llama2-7b", lora(), _dtype, _small)

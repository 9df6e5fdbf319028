"""Projections of single tensors and single elements against the loops that publications come with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Sets, Shapes, elements, gpt2, lora, sd15_kv
from benchmarks.peers import published_surgery
from benchmarks.registry import Call, Case, Provider, register

Pair = Callable[[Tensor, Tensor], Tensor]
Error = Callable[[Sets, list[Tensor], None], float]


def _ours(**options: Any) -> Callable[[Sets], Call]:
    def build(inputs: Sets) -> Call:
        from unlearn_kernels import surgery

        forget, retain = inputs.in_place

        def run() -> list[Tensor]:
            surgery.project_conflict_(forget, retain, **options)
            return forget

        return Call(run, inputs.restore)

    return build


def _loop(project: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[[Sets], Call]:
    def build(inputs: Sets) -> Call:
        forget, retain = inputs.in_place

        def run() -> list[Tensor]:
            project(forget, retain)
            return forget

        return Call(run, inputs.restore)

    return build


def _error(of: Pair) -> Error:
    """Against the formula for each pair of tensors, in float64."""

    def error(inputs: Sets, output: list[Tensor], _: None) -> float:
        off = size = 0.0
        for got, f, r in zip(output, *inputs.sets, strict=True):
            expected = of(f.double(), r.double())
            size += float(expected.square().sum())
            off += float(expected.sub_(got.double()).square_().sum())
        return (off / size) ** 0.5 if off == off else float("inf")

    return error


def _doco(f: Tensor, r: Tensor) -> Tensor:
    dot = torch.clamp((f * r).sum(), max=0.0)
    return f - dot / ((f.norm() + 1e-8) * (r.norm() + 1e-8) ** 2) * r


def _gdr_gma(f: Tensor, r: Tensor) -> Tensor:
    dot = torch.clamp((f * r).sum(), max=0.0)
    x = r - dot / f.square().sum() * f
    return 0.5 * x + 0.5 * (f - dot / r.square().sum() * x)


def _sago(f: Tensor, r: Tensor) -> Tensor:
    return torch.where(f.sign() * r.sign() < 0, r, f)


def _agem_rows(f: Tensor, r: Tensor) -> Tensor:
    dot = torch.clamp((f * r).sum(-1, keepdim=True), max=0.0)
    return f - dot / r.square().sum(-1, keepdim=True) * r


def _graddrop_error(inputs: Sets, output: list[Tensor], _: None) -> float:
    """Where signs agree both are kept, otherwise one of the two by chance."""
    off = size = 0.0
    for got, *pair in zip(output, *inputs.sets, strict=True):
        x, f, r = (t.double() for t in (got, *pair))
        either = torch.minimum((x - f).abs(), (x - r).abs())
        off += float(torch.where(f.sign() * r.sign() < 0, either, x - f - r).square().sum())
        size += float(x.square().sum())
    return (off / size) ** 0.5 if off == off else float("inf")


class _Method(NamedTuple):
    options: dict[str, Any]
    error: Error
    flops: int  # of an element
    peers: tuple[Provider, ...] = ()


def _published(name: str, project: Callable[[list[Tensor], list[Tensor]], None]) -> Provider:
    return Provider(name, _loop(project), "plain")


_METHODS = {
    "doco": _Method(
        {"rule": "doco", "compat": True},
        _error(_doco),
        8,
        (_published("DoCo's loop", published_surgery.doco),),
    ),
    "gdr_gma": _Method(
        {"rule": "gdr_gma", "compat": True},
        _error(_gdr_gma),
        9,
        (_published("GDR-GMA's loop", published_surgery.gdr_gma),),
    ),
    "sago": _Method(
        {"rule": "sago"},
        _error(_sago),
        6,
        (
            _published("SAGO's loop", published_surgery.sago),
            Provider("torch.where", _loop(published_surgery.sago_where)),
        ),
    ),
    "graddrop": _Method(
        {"rule": "graddrop", "seed": 1},
        _graddrop_error,
        12,
        (_published("torch, whole tensors", published_surgery.graddrop),),
    ),
    "agem_rows": _Method(
        {"rule": "agem", "scope": "row"},
        _error(_agem_rows),
        8,
        (_published("torch, whole tensors", published_surgery.agem_rows),),
    ),
}


def _case(name: str, label: str, shapes: Shapes, dtype: torch.dtype, warm: Case | None) -> Case:
    n, method = elements(shapes), _METHODS[name]
    return register(
        Case(
            f"surgery.{name}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=("project_conflict",),
            shape=f"K 2, {len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=method.flops * n,
            bytes=3 * n * dtype.itemsize,
            make=gradient_sets.make(shapes, 2, dtype),
            reference=lambda inputs: None,
            error=method.error,
            providers=(Provider("unlearn_kernels", _ours(**method.options), "ours"), *method.peers),
            bound=1e-6 if dtype == torch.float32 else 2.0**-8,
            peer_bound=5e-2,
            bandwidth="axpy",
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    for _name in _METHODS:
        _small = _case(_name, "small", gpt2(2048, 128, 2, 128), _dtype, None)
        _case(_name, "sd15-kv", sd15_kv(), _dtype, _small)
        _case(_name, "lora-llama2-7b", lora(), _dtype, _small)
        if _name in ("doco", "sago"):
            _case(_name, "gpt2-124m", gpt2(), _dtype, _small)

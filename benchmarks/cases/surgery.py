"""Gradient surgery over whole parameter lists: Gramian, combination, one-sided projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Sets, Shapes, deviation, elements, gpt2, lora, sd15_kv
from benchmarks.peers import plain_surgery, torchjd
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register

_WEIGHTS = (1.0, -0.5, 0.25, 2.0)
# TorchJD sums the Gramian in the inputs' dtype and regularises it, so its weights are right to a few percent.
_TORCHJD_BOUND = 5e-2


class Outcome(NamedTuple):
    """What a projection gave: the projected set, and the Gramian if the method tells it."""

    result: list[Tensor]
    gramian: Tensor | None


def _one_sided(inputs: Sets, output: Outcome, gramian: Tensor) -> float:
    weights = torch.stack((torch.ones((), dtype=torch.float64), -gramian[0, 1] / gramian[1, 1]))
    return deviation(inputs, output.result, weights)


def _symmetric(scale: float) -> Callable[[Sets, Outcome, Tensor], float]:
    """Against the sum of both projections: PCGrad of two conflicting sets (scale 1), UPGrad (scale 1/2)."""

    def error(inputs: Sets, output: Outcome, gramian: Tensor) -> float:
        return deviation(inputs, output.result, scale * (1 - gramian[0, 1] / gramian.diagonal()))

    return error


def _metrics(inputs: Sets, output: Outcome, gramian: Tensor) -> dict[str, float]:
    dot = size = 0.0
    for got, retain in zip(output.result, inputs.sets[1], strict=True):
        wide = got.double()
        dot += float((wide * retain.double()).sum())
        size += float(wide.square().sum())
    found = {"cos after": abs(dot) / (size * float(gramian[1, 1])) ** 0.5}
    if output.gramian is not None:
        found["Gram error"] = float(((output.gramian.cpu() - gramian) / gramian).abs().max())
    return found


def _ours(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    forget, retain = inputs.in_place

    def run() -> Outcome:
        conflict = surgery.project_conflict_(forget, retain, rule="agem", scope="global")
        return Outcome(forget, conflict.gramian)

    return Call(run, inputs.restore)


def _in_place(project: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[[Sets], Call]:
    def build(inputs: Sets) -> Call:
        forget, retain = inputs.in_place

        def run() -> Outcome:
            project(forget, retain)
            return Outcome(forget, None)

        return Call(run, inputs.restore)

    return build


def _compiled(inputs: Sets) -> Call:
    forget, retain = (torch.cat([t.view(-1) for t in group]) for group in inputs.sets)
    function, shapes = compiled(plain_surgery.project_flat), [t.shape for t in inputs.sets[0]]

    def run() -> Outcome:
        parts = function(forget, retain).split([shape.numel() for shape in shapes])
        return Outcome([part.view(shape) for part, shape in zip(parts, shapes, strict=True)], None)

    return Call(run)


def _torchjd(aggregator: str, scale: float, *, gramian_option: bool) -> Provider:
    def build(inputs: Sets) -> Call:
        run, reset = torchjd.aggregation(inputs.stacks, aggregator, gramian_option=gramian_option)
        return Call(lambda: Outcome(run(), None), reset)

    name = f"torchjd {aggregator}" + (", Gramian option" if gramian_option else "")
    requires = ("torchjd", "quadprog", "qpsolvers") if aggregator == "UPGrad" else ("torchjd",)
    return Provider(name, build, requires=requires, error=_symmetric(scale), bound=_TORCHJD_BOUND)


_PROJECT = (
    Provider("unlearn_kernels", _ours, "ours"),
    Provider("torch.dot + _foreach_add_", _in_place(plain_surgery.project_by_dots), "plain"),
    Provider("torch._foreach", _in_place(plain_surgery.project_by_foreach)),
    Provider("torch.compile, flat before", _compiled, compiled=True),
    _torchjd("PCGrad", 1.0, gramian_option=False),
    _torchjd("PCGrad", 1.0, gramian_option=True),
    _torchjd("UPGrad", 0.5, gramian_option=False),
    _torchjd("UPGrad", 0.5, gramian_option=True),
)


def _ours_gramian(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    return Call(lambda: surgery.gramian(inputs.sets))


def _stacked(inputs: Sets) -> Call:
    stacks = [stack.flatten(1) for stack in inputs.stacks]
    return Call(lambda: plain_surgery.gramian_of_stacks(stacks))


_GRAMIAN = (
    Provider("unlearn_kernels", _ours_gramian, "ours"),
    Provider("torch._foreach", lambda x: Call(lambda: plain_surgery.gramian_by_foreach(x.sets)), "plain"),
    Provider("torch J @ J.T, stacked before", _stacked),
)


def _ours_combine(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    weights = torch.tensor(_WEIGHTS[: len(inputs.sets)], dtype=torch.float64)

    def run() -> list[Tensor]:
        surgery.combine_(inputs.in_place, weights)
        return inputs.work

    return Call(run, inputs.restore)


def _foreach_combine(inputs: Sets) -> Call:
    def run() -> list[Tensor]:
        plain_surgery.combine_by_foreach_(inputs.in_place, list(_WEIGHTS))
        return inputs.work

    return Call(run, inputs.restore)


_COMBINE = (
    Provider("unlearn_kernels", _ours_combine, "ours"),
    Provider("torch._foreach", _foreach_combine, "plain"),
)


def _combine_error(inputs: Sets, output: list[Tensor], _: Tensor) -> float:
    return deviation(inputs, output, torch.tensor(_WEIGHTS[: len(inputs.sets)]))


def _gramian_error(_: Sets, output: Tensor, gramian: Tensor) -> float:
    size = gramian.diagonal().sqrt()
    return float(((output.cpu() - gramian).abs() / torch.outer(size, size)).max())


def _case(verb: str, label: str, shapes: Shapes, K: int, dtype: torch.dtype, warm: Case | None) -> Case:
    n, pairs = elements(shapes), K * (K + 1) // 2
    # flops, streams of memory, providers, error, bound: a result in bfloat16 is off by its own rounding.
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-9
    flops, streams, providers, error, bound = {
        "project_conflict": (2 * (pairs + 1) * n, 5, _PROJECT, _one_sided, rounding),
        "gramian": (2 * pairs * n, K, _GRAMIAN, _gramian_error, 1e-6),
        "combine": (2 * K * n, K + 1, _COMBINE, _combine_error, rounding),
    }[verb]
    return register(
        Case(
            f"surgery.{verb}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(verb,),
            shape=f"K {K}, {len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=flops,
            bytes=streams * n * dtype.itemsize,
            make=gradient_sets.make(shapes, K, dtype),
            reference=gradient_sets.gramian,
            error=error,
            providers=providers,
            bound=bound,
            peer_bound=5e-2,
            bandwidth="read" if verb == "gramian" else "axpy",
            metrics=_metrics if verb == "project_conflict" else None,
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    for _verb, _K in (("project_conflict", 2), ("gramian", 4), ("combine", 4)):
        _small = _case(_verb, "small", gpt2(2048, 128, 2, 128), _K, _dtype, None)
        _case(_verb, "lora-llama2-7b", lora(), _K, _dtype, _small)
        if _verb == "project_conflict":
            _case(_verb, "sd15-kv", sd15_kv(), _K, _dtype, _small)
            _case(_verb, "gpt2-124m", gpt2(), _K, _dtype, _small)

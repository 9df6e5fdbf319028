"""AdamW with the surgery in it, against a projection and then AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Sets, Shapes, elements, gpt2, gpt2_half, lora, sd15_kv
from benchmarks.peers import plain_surgery
from benchmarks.registry import Call, Case, Provider, register

_SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}


class Outcome(NamedTuple):
    """What a first step made, from parameters that began as the retain gradient's numbers."""

    parameters: list[nn.Parameter]
    moments: list[Tensor]


def _begin(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], values: list[Tensor]) -> None:
    torch._foreach_copy_(list(parameters), values)
    for state in optimizer.state.values():
        for value in state.values():
            value.zero_()


def _call(
    inputs: Sets, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], step: Callable[[], None]
) -> Call:
    """`step` once, so that the state exists; each call then is a first step."""
    step()

    def run() -> Outcome:
        step()
        return Outcome(parameters, [optimizer.state[p]["exp_avg"] for p in parameters])

    def reset() -> None:
        with torch.no_grad():
            _begin(optimizer, parameters, inputs.sets[1])
            inputs.restore()

    return Call(run, reset)


def _parameters(inputs: Sets) -> list[nn.Parameter]:
    return [nn.Parameter(x.clone()) for x in inputs.sets[1]]


def _ours(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    parameters, (forget, retain) = _parameters(inputs), inputs.sets
    optimizer = surgery.SurgicalAdamW(parameters, **_SETTINGS)

    def step() -> None:
        optimizer.step(forget=forget, retain=retain)

    return _call(inputs, optimizer, parameters, step)


def _then_fused(project: Callable[[list[Tensor], list[Tensor]], None]) -> Callable[[Sets], Call]:
    """The projection in place, then torch's fused AdamW."""

    def build(inputs: Sets) -> Call:
        parameters, (forget, retain) = _parameters(inputs), inputs.in_place
        optimizer = torch.optim.AdamW(parameters, fused=True, **_SETTINGS)
        for p, gradient in zip(parameters, forget, strict=True):
            p.grad = gradient

        def step() -> None:
            project(forget, retain)
            optimizer.step()

        return _call(inputs, optimizer, parameters, step)

    return build


def _project(forget: list[Tensor], retain: list[Tensor]) -> None:
    from unlearn_kernels import surgery

    surgery.project_conflict_(forget, retain)


_PROVIDERS = (
    Provider("unlearn_kernels", _ours, "ours"),
    Provider("project_conflict_, then AdamW(fused=True)", _then_fused(_project), "plain"),
    Provider("torch.dot + _foreach_add_, then AdamW(fused=True)", _then_fused(plain_surgery.project_by_dots)),
)


def _error(inputs: Sets, output: Outcome, gramian: Tensor) -> float:
    """Parameters and first moments against float64, the larger of the two relative errors."""
    beta1, weight = _SETTINGS["betas"][0], -gramian[0, 1] / gramian[1, 1]
    lr, eps, decay = (_SETTINGS[name] for name in ("lr", "eps", "weight_decay"))
    off, size = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for p, m, f, r in zip(*output, *inputs.sets, strict=True):
        g = f.double() + weight * r.double()
        exact = (1 - lr * decay) * r.double() - lr * g / (g.abs() + eps), (1 - beta1) * g
        for i, (got, expected) in enumerate(zip((p.detach(), m), exact, strict=True)):
            off[i] += (got.double() - expected).square().sum()
            size[i] += expected.square().sum()
    return float((off / size).sqrt().max()) if off.isfinite().all() else float("inf")


def _case(label: str, shapes: Shapes, dtype: torch.dtype, warm: Case | None) -> Case:
    n = elements(shapes)
    return register(
        Case(
            f"surgery.adamw/{label}/{str(dtype).removeprefix('torch.')}",
            ops=("surgical_adamw",),
            shape=f"{len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=(6 + 14) * n,
            bytes=10 * n * dtype.itemsize,
            make=gradient_sets.make(shapes, 2, dtype),
            reference=gradient_sets.gramian,
            error=_error,
            providers=_PROVIDERS,
            bound=1e-6 if dtype == torch.float32 else 2.0**-7,
            peer_bound=5e-2,
            bandwidth="axpy",
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    _small = _case("small", gpt2(2048, 128, 2, 128), _dtype, None)
    _case("sd15-kv", sd15_kv(), _dtype, _small)
    _case("lora-llama2-7b", lora(), _dtype, _small)
    _case("gpt2-half", gpt2_half(), _dtype, _small)

"""TorchJD: aggregation of Jacobians that stand in the `.jac` fields already, as after its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def aggregation(
    stacks: list[Tensor], aggregator: str, *, gramian_option: bool
) -> tuple[Callable[[], list[Tensor]], Callable[[], None]]:
    """The call and its reset. `stacks` holds a (K, *shape) tensor per parameter."""
    import torchjd.aggregation
    from torchjd.autojac import jac_to_grad

    options: dict[str, Any] = {"optimize_gramian_computation": True} if gramian_option else {}
    rule = getattr(torchjd.aggregation, aggregator)()
    parameters = [nn.Parameter(torch.empty_like(stack[0])) for stack in stacks]

    def reset() -> None:
        for parameter, stack in zip(parameters, stacks, strict=True):
            parameter.grad = None
            parameter.__setattr__("jac", stack)

    def run() -> list[Tensor]:
        jac_to_grad(parameters, rule, **options)
        return [parameter.grad for parameter in parameters if parameter.grad is not None]

    return run, reset

"""Inputs and outputs of chosen linear layers, kept while a forward pass runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def captured(layers: Sequence[nn.Linear]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yields a list that the forward pass fills with `(input, output)` of each layer, in call order.

    `torch.autograd.grad(loss, outputs)` then gives the output gradients, without any weight's gradient.
    """
    calls: list[tuple[Tensor, Tensor]] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append((inputs[0].detach(), output))

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()

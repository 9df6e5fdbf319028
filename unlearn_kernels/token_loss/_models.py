"""Models as they are handed over: maybe wrapped, with a head somewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """What DDP and other wrappers hold as `module`, however many there are."""
    while isinstance(inner := getattr(model, "module", None), nn.Module):
        model = inner
    return model


def head_of(model: nn.Module) -> nn.Module | None:
    """What maps hidden states to logits; None where a model does not say, or has none."""
    find = getattr(unwrapped(model), "get_output_embeddings", None)
    found: nn.Module | None = None if find is None else find()
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training

"""How a module's tensors hold the samples, and the way from there to samples first."""

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from unlearn_kernels.per_sample.modules.embedding import EmbeddingLayer
from unlearn_kernels.per_sample.modules.fallback import FallbackLayer
from unlearn_kernels.per_sample.modules.layer import Layer

Layout: TypeAlias = Literal["samples", "broadcast", "folded"]
Placement: TypeAlias = Callable[[Tensor], Tensor]
Tensors: TypeAlias = tuple[Tensor, ...]


def place(
    layer: Layer, outputs: Tensors, kept: Tensors, samples: int, layout: Layout | None, batch_first: bool
) -> tuple[Tensors, Tensors, Placement]:
    """The outputs and kept tensors of a call, expanded over the samples where all share them, and the function
    that brings kept tensors and output gradients to samples first.

    Raises:
        ValueError: if the tensors are not laid out as `layout` says, or it is not clear how they are.
    """
    if isinstance(layer, FallbackLayer):
        for x in outputs:
            _must(layer, x, samples, x.dim() > 0 and x.shape[0] == samples and batch_first)
        return outputs, kept, _as_is
    ((output,), (first, *_)) = outputs, kept
    layer.check((first,), output)
    layout = layout or _recognised(layer, output, first, samples, batch_first)
    if layout == "broadcast":
        prepend = output.shape[0] != 1 or first.dim() == 1
        return (_shared(output, samples, prepend),), (_shared(first, samples, prepend),), _as_is
    if layout == "folded":
        _must(layer, output, samples, layer.flexible and output.shape[0] % samples == 0)
        return (output,), (first,), lambda x: x.reshape(samples, -1, *x.shape[1:])
    dim = 0 if batch_first else 1
    fits = output.dim() > dim + 1 and output.shape[dim] == samples == first.shape[dim]
    _must(layer, output, samples, fits)
    return (output,), (first,), _as_is if batch_first else _swapped


def _recognised(layer: Layer, output: Tensor, first: Tensor, samples: int, batch_first: bool) -> Layout:
    if not batch_first or samples == 1:
        return "samples"
    if not isinstance(layer, EmbeddingLayer):
        return "samples"
    vector = first.dim() == 1
    if vector and (first.shape[0] == 1 or (first.shape[0] == samples and _counts(first))):
        raise ValueError(
            f"{layer.path}: ids {tuple(first.shape)} may be positions that all samples share, or one id a sample: "
            f"pass layout={{{layer.path!r}: 'broadcast'}} or 'samples'"
        )
    shared = first.shape[0] != samples if vector else first.shape[0] == 1
    return "broadcast" if shared else "samples"


def _counts(ids: Tensor) -> bool:
    return torch.equal(ids, torch.arange(ids.shape[0], dtype=ids.dtype, device=ids.device))


def _shared(x: Tensor, samples: int, prepend: bool) -> Tensor:
    return x.expand(samples, *x.shape) if prepend else x.expand(samples, *x.shape[1:])


def _must(layer: Layer, output: Tensor, samples: int, fits: bool) -> None:
    if not fits:
        raise ValueError(
            f"{layer.path}: output {tuple(output.shape)} does not have the {samples} samples where they are expected. "
            f"Pass layout={{{layer.path!r}: 'broadcast'}} if all samples share it, 'folded' if it is a flattened "
            "(B * T, ...), batch_first=False if samples are the second dimension"
        )


def _as_is(x: Tensor) -> Tensor:
    return x


def _swapped(x: Tensor) -> Tensor:
    return x.transpose(0, 1)

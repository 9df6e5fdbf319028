"""Checks of arguments that several layers take. Each raises a `ValueError` that names the argument."""

import torch
from torch import Tensor


def check_floats(**tensors: Tensor) -> None:
    """Floating-point tensors of at least two dimensions on one device, all float64 or none."""
    (first, one), *rest = tensors.items()
    for name, x in tensors.items():
        if x.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions (batch, ..., features), got {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
    for name, x in rest:
        if x.device != one.device:
            raise ValueError(f"{first} and {name} must be on one device, got {one.device} and {x.device}")
        if x.dtype != one.dtype and torch.float64 in (x.dtype, one.dtype):
            raise ValueError(
                f"{first} and {name} must both be float64 or neither, got {one.dtype} and {x.dtype}"
            )


def folded(x: Tensor) -> Tensor:
    """`x` as (B, T, features), with every dimension between the first and the last folded into T."""
    if x.dim() == 3:
        return x
    return x.reshape(x.shape[0], 1 if x.dim() == 2 else x.shape[1:-1].numel(), x.shape[-1])


def check_weights(w: Tensor, like: Tensor, batch: int) -> None:
    """One real weight a sample, on the device of `like`."""
    if w.shape != (batch,):
        raise ValueError(f"w must have shape ({batch},), got {tuple(w.shape)}")
    if w.is_complex() or w.dtype == torch.bool:
        raise ValueError(f"w must be a tensor of real numbers, got {w.dtype}")
    if w.device != like.device:
        raise ValueError(f"w must be on {like.device}, got {w.device}")

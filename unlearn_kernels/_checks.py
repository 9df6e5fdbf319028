"""Checks that several families share."""

import torch
from torch import Tensor


def check_range(name: str, ids: Tensor, size: int, ignored: int | None = None) -> None:
    """Raises ValueError unless every element of `ids` is in [0, size) or `ignored`. Waits for the device."""
    if torch.compiler.is_compiling() or ids.numel() == 0:
        return
    outside = (ids < 0) | (ids >= size)
    if ignored is not None:
        outside &= ids != ignored
    if outside.any():
        allowed = "" if ignored is None else f" or {ignored}"
        raise ValueError(f"{name} must be in [0, {size}){allowed}, got {int(ids[outside][0])}")

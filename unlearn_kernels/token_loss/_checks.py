"""Checks of hidden states, heads and labels, with errors that name the argument."""

import math
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels._checks import check_range

# An `ignore_index` that is no label: every row counts.
NO_LABEL: Final = -(1 << 62)


def check_head(h: Tensor, W: Tensor, bias: Tensor | None, suffix: str = "") -> None:
    """Hidden states (*, d), a head (V, d) and its bias (V,). `suffix` ends the names in messages."""
    names = [f"{name}{suffix}" for name in ("h", "W", "bias")]
    if W.dim() != 2:
        raise ValueError(f"{names[1]} must have shape (V, d), got {tuple(W.shape)}")
    if h.dim() < 1 or h.shape[-1] != W.shape[1]:
        raise ValueError(
            f"{names[0]} must have shape (*, {W.shape[1]}) to fit {names[1]}, got {tuple(h.shape)}"
        )
    if bias is not None and bias.shape != W.shape[:1]:
        raise ValueError(f"{names[2]} must have shape ({W.shape[0]},), got {tuple(bias.shape)}")
    for name, x in zip(names, (h, W, bias), strict=True):
        if x is None:
            continue
        if x.device != h.device:
            raise ValueError(f"{name} must be on the device of {names[0]}, {h.device}, got {x.device}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if (x.dtype == torch.float64) != (h.dtype == torch.float64):
            raise ValueError(
                f"{', '.join(names[:2])} and {names[2]} must all be float64 or none, got {name} of {x.dtype} "
                f"and {names[0]} of {h.dtype}"
            )


def check_labels(h: Tensor, labels: Tensor) -> Tensor:
    """Labels (*) of hidden states (*, d), as int64: in narrower types an ignored label may be a word's."""
    if labels.shape != h.shape[:-1]:
        raise ValueError(f"labels must have shape {tuple(h.shape[:-1])} to fit h, got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    if labels.device != h.device:
        raise ValueError(f"labels must be on the device of h, {h.device}, got {labels.device}")
    return labels.long()


def check_words(labels: Tensor, V: int, ignore_index: int) -> None:
    """Labels that are words or ignored. Waits for the device."""
    check_range("labels", labels, V, None if ignore_index == NO_LABEL else ignore_index)


def check_logits(scale: float, softcap: float | None) -> tuple[float, float]:
    """Scale and soft-cap as the raw operators take them: 0 for no soft-cap."""
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}")
    return float(scale), 0.0 if softcap is None else float(softcap)

"""Distances from a float64 reference."""

from __future__ import annotations

import torch
from torch import Tensor


def elementwise(got: Tensor, expected: Tensor) -> float:
    """The largest |got - expected| / |expected| over the elements."""
    smallest = torch.finfo(torch.float64).tiny
    return float(((got.double() - expected).abs() / expected.abs().clamp_min(smallest)).max())

"""`torch.compile` on the plain formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for exactly the shapes that it is called with."""
    return torch.compile(function, dynamic=False, fullgraph=True)

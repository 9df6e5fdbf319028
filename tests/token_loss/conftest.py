from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from unlearn_kernels.testing import randn


class Head(NamedTuple):
    """Arguments of the losses: hidden states (*, d), head (V, d), labels (*), bias (V,) or None."""

    h: Tensor
    W: Tensor
    labels: Tensor
    bias: Tensor | None

    def double(self) -> "Head":
        """The same rounded numbers in float64."""
        return Head(
            self.h.double(), self.W.double(), self.labels, None if self.bias is None else self.bias.double()
        )

    def leaves(self) -> list[Tensor]:
        """Fresh leaves of what is differentiable."""
        return [x.detach().requires_grad_() for x in (self.h, self.W, self.bias) if x is not None]


def make_head(
    rows: tuple[int, ...],
    d: int,
    V: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    ignored: float = 0.3,
) -> Head:
    h, W = randn(*rows, d, dtype=dtype), randn(V, d, dtype=dtype, seed=1) * d**-0.5
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, V, rows, generator=generator)
    labels[torch.rand(rows, generator=generator) < ignored] = -100
    return Head(h, W, labels, randn(V, dtype=dtype, seed=3) if bias else None)


@pytest.fixture
def head() -> Callable[..., Head]:
    return make_head

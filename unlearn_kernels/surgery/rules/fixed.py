"""Weights that do not look at the Gramian."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from unlearn_kernels.surgery.rules.rule import Rule, row


@dataclass(eq=False)
class Sum(Rule):
    """The plain sum, `w_k = 1`. No wait on CUDA."""

    name: ClassVar[str] = "sum"

    def solve(self, gramian: Tensor) -> Tensor:
        """Ones."""
        return gramian.new_ones(gramian.shape[:-1])


@dataclass(eq=False)
class Mean(Rule):
    """The mean, `w_k = 1 / K`. No wait on CUDA."""

    name: ClassVar[str] = "mean"

    def solve(self, gramian: Tensor) -> Tensor:
        """`1 / K`."""
        return gramian.new_full(gramian.shape[:-1], 1 / gramian.shape[-1])


@dataclass(eq=False)
class Constant(Rule):
    """Given weights, as of a scalarised loss. No wait on CUDA.

    Args:
        values: one number a set.
    """

    name: ClassVar[str] = "constant"
    values: Sequence[float]

    def solve(self, gramian: Tensor) -> Tensor:
        """The values."""
        return row(gramian, self.values, 1.0, "values").expand(gramian.shape[:-1]).clone()

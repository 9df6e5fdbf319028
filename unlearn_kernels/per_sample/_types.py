"""What the layers of the per-sample family return and take."""

from typing import NamedTuple

from torch import Tensor


class Gradients(NamedTuple):
    """Gradients of one layer's parameters.

    Attributes:
        weight: the gradient of the weight, in its shape, or one a sample, (B, *shape).
        bias: the gradient of the bias, (p,) or (B, p); None where it was not asked for.
    """

    weight: Tensor
    bias: Tensor | None


class TwoSided(NamedTuple):
    r"""A projection of a matrix gradient from both sides, `W_i \mapsto L W_i R^T` (LoGra).

    Attributes:
        left: acts on the outputs, (k_o, p).
        right: acts on the inputs, (k_i, d).

    Source: Choe et al. 2024, arXiv 2405.13954 (LoGra).
    """

    left: Tensor
    right: Tensor

"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`."""

from unlearn_kernels.per_sample import conv, embedding, linear, norm
from unlearn_kernels.per_sample._types import Gradients, TwoSided

__all__ = ["Gradients", "TwoSided", "conv", "embedding", "linear", "norm"]

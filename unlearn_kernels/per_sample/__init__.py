"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`."""

from unlearn_kernels.per_sample import conv, linear

__all__ = ["conv", "linear"]

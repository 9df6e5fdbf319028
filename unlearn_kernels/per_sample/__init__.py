"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`."""

from unlearn_kernels.per_sample import linear

__all__ = ["linear"]

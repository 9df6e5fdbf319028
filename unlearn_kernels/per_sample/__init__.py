"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`."""

from unlearn_kernels.per_sample import linear, lm_head

__all__ = ["linear", "lm_head"]

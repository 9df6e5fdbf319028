"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`."""

from unlearn_kernels.per_sample import embedding, linear, norm

__all__ = ["embedding", "linear", "norm"]

"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`."""

from unlearn_kernels.per_sample import linear
from unlearn_kernels.per_sample._types import Gradients, TwoSided
from unlearn_kernels.per_sample.model import PerSampleGradients

__all__ = ["Gradients", "PerSampleGradients", "TwoSided", "linear"]

"""Per-sample gradients of a layer, straight from its inputs `A` and output gradients `G`, and of a whole model."""

from unlearn_kernels.per_sample import conv, embedding, linear, lm_head, norm
from unlearn_kernels.per_sample._types import Gradients, TwoSided
from unlearn_kernels.per_sample.model import PerSampleGradients

__all__ = [
    "Gradients",
    "PerSampleGradients",
    "TwoSided",
    "conv",
    "embedding",
    "linear",
    "lm_head",
    "norm",
]

"""Data attribution: random projections of gradients and search in a store of them."""

from unlearn_kernels.influence.projection import Projection, RunningProjection
from unlearn_kernels.influence.search import TopK, topk

__all__ = ["Projection", "RunningProjection", "TopK", "topk"]

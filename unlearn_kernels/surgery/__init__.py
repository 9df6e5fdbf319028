"""Gradient surgery: inner products of whole gradients, and the gradient made from them."""

from unlearn_kernels.surgery.combine import combine, combine_
from unlearn_kernels.surgery.conflict import Conflict, project_conflict_
from unlearn_kernels.surgery.gramian import gramian
from unlearn_kernels.surgery.masks import apply_mask_, topk_mask

__all__ = [
    "Conflict",
    "apply_mask_",
    "combine",
    "combine_",
    "gramian",
    "project_conflict_",
    "topk_mask",
]

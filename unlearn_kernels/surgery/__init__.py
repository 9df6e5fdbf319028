"""Gradient surgery: inner products of whole gradients, and the gradient made from them."""

from unlearn_kernels.surgery._step import Step
from unlearn_kernels.surgery.adamw import SurgicalAdamW
from unlearn_kernels.surgery.combine import combine, combine_
from unlearn_kernels.surgery.compressed import CompressedGradient
from unlearn_kernels.surgery.conflict import Conflict, project_conflict_
from unlearn_kernels.surgery.gramian import gramian
from unlearn_kernels.surgery.masks import apply_mask_, topk_mask
from unlearn_kernels.surgery.metric import project_span_, weighted_gramian
from unlearn_kernels.surgery.objectives import GradientSurgery
from unlearn_kernels.surgery.rules import weights
from unlearn_kernels.surgery.subspace import Bases, SubspaceMemory, project_out_

__all__ = [
    "Bases",
    "CompressedGradient",
    "Conflict",
    "GradientSurgery",
    "Step",
    "SubspaceMemory",
    "SurgicalAdamW",
    "apply_mask_",
    "combine",
    "combine_",
    "gramian",
    "project_conflict_",
    "project_out_",
    "project_span_",
    "topk_mask",
    "weighted_gramian",
    "weights",
]

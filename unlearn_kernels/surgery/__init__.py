"""Gradient surgery: inner products of whole gradients, and the gradient made from them."""

from unlearn_kernels.surgery._step import Step
from unlearn_kernels.surgery.combine import combine, combine_
from unlearn_kernels.surgery.conflict import Conflict, project_conflict_
from unlearn_kernels.surgery.gramian import gramian
from unlearn_kernels.surgery.objectives import GradientSurgery
from unlearn_kernels.surgery.rules import weights

__all__ = [
    "Conflict",
    "GradientSurgery",
    "Step",
    "combine",
    "combine_",
    "gramian",
    "project_conflict_",
    "weights",
]

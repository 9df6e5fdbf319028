"""Data attribution: projections of gradients, a store of them and its search, products with inverse curvature."""

from unlearn_kernels.influence._found import Ends, Found, merge
from unlearn_kernels.influence.collector import InfluenceCollector
from unlearn_kernels.influence.datainf import datainf, datainf_damping, squared_norms
from unlearn_kernels.influence.ekfac import EKFAC, covariance, squared_gradients, squared_rows
from unlearn_kernels.influence.inverses import datainf_inverse, diagonal, ekfac_inverse, fisher, newton
from unlearn_kernels.influence.layers import layer_projections
from unlearn_kernels.influence.projection import Projection, RunningProjection
from unlearn_kernels.influence.ranks import RankedStore
from unlearn_kernels.influence.sample_losses import class_losses, language_losses, noise_losses
from unlearn_kernels.influence.search import TopK, topk
from unlearn_kernels.influence.solvers import Eigenpairs, Iterated, arnoldi, cg, lissa
from unlearn_kernels.influence.store import GradientStore, StoreError
from unlearn_kernels.influence.update import Update, forget_gradient, influence_update_
from unlearn_kernels.influence.woodbury import Solution, Woodbury, cholesky_update, woodbury_solve

__all__ = [
    "EKFAC",
    "Eigenpairs",
    "Ends",
    "Found",
    "GradientStore",
    "InfluenceCollector",
    "Iterated",
    "Projection",
    "RankedStore",
    "RunningProjection",
    "Solution",
    "StoreError",
    "TopK",
    "Update",
    "Woodbury",
    "arnoldi",
    "cg",
    "cholesky_update",
    "class_losses",
    "covariance",
    "datainf",
    "datainf_damping",
    "datainf_inverse",
    "diagonal",
    "ekfac_inverse",
    "fisher",
    "forget_gradient",
    "influence_update_",
    "language_losses",
    "layer_projections",
    "lissa",
    "merge",
    "newton",
    "noise_losses",
    "squared_gradients",
    "squared_norms",
    "squared_rows",
    "topk",
    "woodbury_solve",
]

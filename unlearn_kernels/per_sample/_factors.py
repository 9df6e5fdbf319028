"""Projections of a linear layer's gradients from their factors, for the kinds that have no kernel of signs."""

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend, select
from unlearn_kernels.influence.projection import Projection
from unlearn_kernels.reference.dtypes import accumulation_dtype

_AT_ONCE = 1 << 22  # elements of gradients


def project_factors(
    a: Tensor, g: Tensor, projection: Projection, bias: bool, backend: Backend | None
) -> Tensor:
    """(B, k) projections of `sum_t g_t a_t^T`, flattened, then the bias's; a (B, T, d), g (B, T, p)."""
    if projection.kind == "tensorsketch" and not bias and projection.shape == (g.shape[2], a.shape[2]):
        call = select("tensor_sketch", backend, (a, g))
        return call(a, g, False, projection.k, projection.seed)
    if projection.kind == "two_sided" and not bias and projection.shape == (g.shape[2], a.shape[2]):
        left, right = (x.to(a.device, accumulation_dtype(a, g)) for x in projection.matrices())
        return select("linear_two_sided", backend, (a, g, left, right))(a, g, left, right, False)
    return _by_rows(a, g, projection, bias, backend)


def _by_rows(a: Tensor, g: Tensor, projection: Projection, bias: bool, backend: Backend | None) -> Tensor:
    """The gradients of some outputs at a time."""
    wide = accumulation_dtype(a, g)
    total = project_part(a, g, projection, 0, backend)
    if bias:
        total += projection.project_part(g.to(wide).sum(1), g.shape[2] * a.shape[2], backend=backend)
    return total.to(wide)


def project_part(
    a: Tensor, g: Tensor, projection: Projection, offset: int, backend: Backend | None = None
) -> Tensor:
    """What `sum_t g_t a_t^T`, whose first coordinate is `offset`, adds to a projection, (B, k) float64."""
    wide, d = accumulation_dtype(a, g), a.shape[2]
    total = torch.zeros(a.shape[0], projection.k, dtype=torch.float64, device=a.device)
    step = max(1, _AT_ONCE // max(a.shape[0] * d, 1))
    for first in range(0, g.shape[2], step):
        rows = g[:, :, first : first + step].to(wide).mT @ a.to(wide)
        total += projection.project_part(rows.flatten(1), offset + first * d, backend=backend)
    return total

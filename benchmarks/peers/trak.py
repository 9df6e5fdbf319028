"""TRAK: its CPU projector, which draws the matrix again in blocks of columns for every batch."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def project(g: Tensor, k: int, kind: str) -> Callable[[], Tensor]:
    """The projection of a (B, dim) batch, scaled by 1/sqrt(k) as ours is."""
    from trak.projectors import BasicProjector

    projector = BasicProjector(g.shape[1], k, seed=0, proj_type=kind, device=g.device)
    return lambda: projector.project(g, model_id=0) * k**-0.5

r"""DataInf: influence with the average of the inverses of `g_i g_i^T + \lambda I` for the inverse of their average."""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels.influence import (
    _codes,
    _curvature_ops,  # noqa: F401  registers the operator
)
from unlearn_kernels.reference import curvature

_QUERIES: Final = 16  # up to which the kernel that reads rows once beats three products


def squared_norms(rows: Sequence[Tensor]) -> Tensor:
    """Return squared norms of the rows of each layer, (L, n) float64: what `datainf` takes and a store caches."""
    return torch.stack([_codes.squared_norms(g) for g in rows])


def datainf_damping(rows: Sequence[Tensor], norms: Tensor) -> Tensor:
    r"""Return `\lambda_l = 0.1 \, mean_i |g_{l,i}|^2 / d_l`, (L,) float64."""
    return 0.1 * norms.double().mean(1) / torch.tensor([g.shape[1] for g in rows], device=norms.device)


def datainf(
    rows: Sequence[Tensor],
    queries: Sequence[Tensor],
    *,
    norms: Tensor | None = None,
    damping: Tensor | None = None,
) -> Tensor:
    r"""Influence of n samples on Q queries, the sum over layers l of

    .. math:: \Big\langle g_k, \frac 1 n \sum_i (g_i g_i^T + \lambda_l I)^{-1} v \Big\rangle
        = \frac 1 {\lambda_l} \Big( \langle v, g_k \rangle -
        \frac 1 n \sum_i \frac{\langle v, g_i \rangle}{\lambda_l + |g_i|^2} \langle g_i, g_k \rangle \Big)

    A large value: sample k's gradient points where the query's does. The reference code's score is its negative.

    Args:
        rows: each layer's gradients, (n, d_l), floating-point.
        queries: each layer's query gradients, (Q, d_l).
        norms: squared norms of the rows, (L, n), from `squared_norms`; None: computed here.
        damping: `\lambda`, (L,), positive; None: `datainf_damping`.

    Returns:
        (Q, n) float64. Every layer's rows are read from memory once where a layer fits in the last cache, for up to 16
        queries on the CPU; above that three products of torch do better.

    Raises:
        ValueError: if shapes do not fit or a damping is not positive.

    Scratch: `4 B * Q * d_l`, at least `4 KB * Q` a thread, and `8 B * Q n * d_l / 1024`.

    Source: Kwon et al. 2024, arXiv 2310.00902 (DataInf).
    """
    _check(rows, queries)
    norms = squared_norms(rows) if norms is None else norms
    layers, n = len(rows), rows[0].shape[0]
    if norms.shape != (layers, n):
        raise ValueError(f"norms must have shape ({layers}, {n}), got {tuple(norms.shape)}")
    damping = datainf_damping(rows, norms) if damping is None else damping
    if damping.shape != (layers,):
        raise ValueError(f"damping must have shape ({layers},), got {tuple(damping.shape)}")
    if not bool((damping > 0).all()):
        raise ValueError("damping must be positive")
    wide = (norms.double().contiguous(), damping.double().contiguous())
    on_cpu = rows[0].device.type == "cpu" and all(x.dtype != torch.float64 for x in (*rows, *queries))
    if on_cpu and queries[0].shape[0] <= _QUERIES and _ops.no_extension() is None:
        return _ops.raw("datainf_scores")(*([_floats(x) for x in xs] for xs in (rows, queries)), *wide)
    return curvature.datainf_scores(list(rows), list(queries), *wide)


def _floats(x: Tensor) -> Tensor:
    x = x.detach().float()
    return x if x.stride(1) == 1 else x.contiguous()


def _check(rows: Sequence[Tensor], queries: Sequence[Tensor]) -> None:
    if not rows or len(rows) != len(queries):
        raise ValueError(f"rows and queries must have as many layers, got {len(rows)} and {len(queries)}")
    for layer, (g, v) in enumerate(zip(rows, queries, strict=True)):
        if g.dim() != 2 or v.dim() != 2 or g.shape[1] != v.shape[1] or len(g) != len(rows[0]):
            raise ValueError(
                f"layer {layer} must have rows ({len(rows[0])}, d) and queries (Q, d), "
                f"got {tuple(g.shape)} and {tuple(v.shape)}"
            )
        if len(v) != len(queries[0]) or not (g.is_floating_point() and v.is_floating_point()):
            raise ValueError(
                f"layer {layer} must have {len(queries[0])} floating-point queries, got {len(v)}"
            )
    if len(rows[0]) == 0:
        raise ValueError("rows must not be empty")

r"""DataInf: influence with the average of the inverses of `g_i g_i^T + \lambda I` for the inverse of their average."""

import math
from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import UP_TO_SINGLE, Backend, Impl, Operator, requested, select
from unlearn_kernels.influence import (
    _codes,
    _curvature_ops,  # noqa: F401  registers the operator
)
from unlearn_kernels.reference import curvature

_QUERIES: Final = 16  # up to which the kernel that reads rows once beats three products
_LOST: Final = 2e-4  # of a score, by rounding to float32


def squared_norms(rows: Sequence[Tensor], *, backend: Backend | None = None) -> Tensor:
    """Return squared norms of the rows of each layer, (L, n) float64: what `datainf` takes and a store caches."""
    return torch.stack([_codes.squared_norms(g, backend) for g in rows])


def datainf_damping(rows: Sequence[Tensor], norms: Tensor) -> Tensor:
    r"""Return `\lambda_l = 0.1 \, mean_i |g_{l,i}|^2 / d_l`, (L,) float64."""
    widths = torch.tensor([max(g.shape[1], 1) for g in rows], device=norms.device)
    return 0.1 * norms.double().mean(1) / widths


def check_damping(damping: Tensor, norms: Tensor) -> None:
    """Refuse what is not positive, but for layers of zeros alone: norms (L, n)."""
    for layer, (lam, most) in enumerate(zip(damping.tolist(), norms.amax(1).tolist(), strict=True)):
        if not math.isfinite(most):
            raise ValueError(f"norms must be finite, got {most} in layer {layer}")
        if not (lam > 0 or lam == most == 0):
            raise ValueError(f"damping must be positive, got {lam} for layer {layer}")


def datainf(
    rows: Sequence[Tensor],
    queries: Sequence[Tensor],
    *,
    norms: Tensor | None = None,
    damping: Tensor | None = None,
    backend: Backend | None = None,
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
        damping: `\lambda`, (L,), positive; None: `datainf_damping`. A layer whose gradients are all zero may have 0: it
            adds nothing.
        backend: see `unlearn_kernels.use_backend`. The kernel is `cpp`, the products are `reference`.

    Returns:
        (Q, n) float64. Every layer's rows are read from memory once where a layer fits in the last cache, for up to 16
        queries on the CPU, and sums are in float32. More queries, and those whose terms nearly cancel, as where rows
        are nearly parallel, take three products of torch in float64.

    Raises:
        ValueError: if shapes do not fit, a damping is not positive, or a norm is not finite.
        BackendError: if `backend` cannot run.

    Scratch: `4 B * Q * d_l`, at least `4 KB * Q` a thread, and `8 B * Q n * d_l / 1024`; in float64 32 MB, or
    `2 KB * (n + Q)`, of rows and queries.

    Source: Kwon et al. 2024, arXiv 2310.00902 (DataInf).
    """
    _check(rows, queries)
    call = _chosen(rows, queries, backend)
    norms = squared_norms(rows, backend=backend) if norms is None else norms
    layers, n = len(rows), rows[0].shape[0]
    if norms.shape != (layers, n):
        raise ValueError(f"norms must have shape ({layers}, {n}), got {tuple(norms.shape)}")
    damping = datainf_damping(rows, norms) if damping is None else damping
    if damping.shape != (layers,):
        raise ValueError(f"damping must have shape ({layers},), got {tuple(damping.shape)}")
    check_damping(damping, norms)
    live = [layer for layer, lam in enumerate(damping.tolist()) if lam > 0]
    if not live:
        return norms.new_zeros(len(queries[0]), n, dtype=torch.float64)
    rows, queries = [rows[layer] for layer in live], [queries[layer] for layer in live]
    wide = (norms[live].double().contiguous(), damping[live].double().contiguous())
    scores: Tensor = call(rows, queries, *wide)
    return scores


def _in_one_pass(rows: list[Tensor], queries: list[Tensor], norms: Tensor, damping: Tensor) -> Tensor:
    scores: Tensor = _ops.raw("datainf_scores")(
        [_floats(g) for g in rows], [_floats(v) for v in queries], norms, damping
    )
    lost = _cancelled(queries, norms, damping, scores)
    if len(lost):
        scores[lost] = curvature.datainf_scores(rows, [v[lost] for v in queries], norms, damping)
    return scores


_DATAINF: Final = Operator(
    "datainf",
    "influence",
    "sum_l (v g^T - v g^T / (n (damping + norms)) g g^T) / damping",
    {
        "cpp": Impl("cpp", _in_one_pass, ("cpu",), UP_TO_SINGLE, _ops.no_extension),
        "reference": Impl("reference", curvature.datainf_scores, ("cpu", "cuda")),
    },
)


def _chosen(
    rows: Sequence[Tensor], queries: Sequence[Tensor], backend: Backend | None
) -> Callable[..., Tensor]:
    """By default the kernel where it beats three products, which run everywhere."""
    tensors = (*rows, *queries)
    fits = all(x.device.type == "cpu" and x.dtype in UP_TO_SINGLE for x in tensors)
    if requested(backend) is None and not (fits and len(queries[0]) <= _QUERIES):
        return curvature.datainf_scores
    return select(_DATAINF, backend, tensors)


def _cancelled(queries: list[Tensor], norms: Tensor, damping: Tensor, scores: Tensor) -> Tensor:
    """Which queries' scores are so small beside the terms they are a difference of that float32 has lost them."""
    terms = torch.zeros_like(scores)
    for v, norm, lam in zip(queries, norms, damping, strict=True):
        terms += torch.linalg.vector_norm(v, dim=1, dtype=torch.float64)[:, None] * norm.sqrt() / lam
    rounding = torch.finfo(torch.float32).eps / 2 * terms.norm(dim=1)
    return (rounding > _LOST * scores.norm(dim=1)).nonzero().flatten()


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
        if len(v) != len(queries[0]):
            raise ValueError(f"layer {layer} must have {len(queries[0])} queries, got {len(v)}")
        if not (g.is_floating_point() and v.is_floating_point()):
            raise ValueError(
                f"layer {layer} must have floating-point rows and queries, got {g.dtype} and {v.dtype}"
            )
    if len(rows[0]) == 0:
        raise ValueError(f"rows must not be empty, got {tuple(rows[0].shape)}")

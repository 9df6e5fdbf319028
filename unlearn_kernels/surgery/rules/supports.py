"""Small quadratic programs solved exactly: every set of active constraints is tried at once.

With K variables there are 2^K candidates, each a linear system of K or K + 1 unknowns. A batched solve and one
selection need no iteration and no look from the host, which suits a GPU and small K alike. Beyond `MOST` variables
quadprog's dual method runs on the host.
"""

from typing import Any

import torch
from torch import Tensor

from unlearn_kernels.surgery.rules.rule import diagonal

MOST = 10

# Relative to the smallest gradient: chooses, among the solutions for dependent gradients, the shortest weights.
_RIDGE = 1e-12


def _subsets(K: int, like: Tensor) -> Tensor:
    """All subsets of K, (2^K, K), 1 where an element is in; the empty one first."""
    bits = torch.arange(K, device=like.device)
    numbers = torch.arange(2**K, device=like.device)[:, None]
    return ((numbers >> bits) & 1).to(like.dtype)


def _system(gramian: Tensor, free: Tensor) -> Tensor:
    """`G` on the free variables, the identity on the others, (..., S, K, K)."""
    both = free[:, :, None] * free[:, None, :]
    return both * gramian[..., None, :, :] + torch.diag_embed(1 - free)


def _ridged(gramian: Tensor) -> Tensor:
    """The Gramian in units of its smallest positive diagonal entry, with a ridge."""
    squares = diagonal(gramian)
    unit = torch.where(squares > 0, squares, torch.inf).amin(-1)
    unit = torch.where(unit.isinf(), 1.0, unit)[..., None, None]
    return gramian / unit + _RIDGE * torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device)


def _least(violation: Tensor, candidates: Tensor, dim: int) -> Tensor:
    """Of the candidates along `dim`, with the variables last, the one whose `violation` is least."""
    at = torch.where(violation.isfinite(), violation, torch.inf).argmin(dim + 1, keepdim=True)
    return candidates.take_along_dim(at[..., None], dim).squeeze(dim)


def above(gramian: Tensor, lower: Tensor) -> Tensor:
    r"""`\arg\min_v v^\top G v` subject to `v \ge u`, for several `u` of one Gramian.

    Args:
        gramian: (..., K, K), positive semi-definite.
        lower: (..., P, K), the `u`.

    Returns:
        (..., P, K).
    """
    # In units of the gradients' lengths all conditions are of one size.
    norms = diagonal(gramian).sqrt()
    norms = torch.where(norms > 0, norms, 1.0)
    C = _ridged(gramian / (norms[..., :, None] * norms[..., None, :]))
    u = lower * norms[..., None, :]
    found = (_above_by_supports if C.shape[-1] <= MOST else _above_by_quadprog)(C, u)
    return torch.maximum(found / norms[..., None, :], lower)


def _above_by_supports(C: Tensor, u: Tensor) -> Tensor:
    free = _subsets(C.shape[-1], C)
    f = free[:, None, :]
    fixed = (1 - f) * u[..., None, :, :]  # (..., S, P, K)
    right = fixed - f * (fixed @ C[..., None, :, :])
    y = torch.linalg.solve_ex(_system(C, free), right.mT)[0].mT
    slope = y @ C[..., None, :, :]
    freed = (u[..., None, :, :] - y).clamp(min=0) + slope.abs()
    violation = torch.where(f > 0, freed, (-slope).clamp(min=0)).amax(-1)
    return _least(violation, y, -3)


def min_norm(gramian: Tensor) -> Tensor:
    r"""`\arg\min_w w^\top G w` over the simplex, (..., K): the shortest vector in the gradients' convex hull."""
    G = _ridged(gramian)
    if G.shape[-1] > MOST:
        return _simplex_by_quadprog(G, torch.zeros_like(G[..., 0]))
    free = _subsets(G.shape[-1], G)[1:]
    edge = free.expand(*G.shape[:-2], *free.shape)[..., None]
    corner = torch.zeros_like(edge[..., :1, :])
    matrix = torch.cat([torch.cat([_system(G, free), edge], -1), torch.cat([edge.mT, corner], -1)], -2)
    right = torch.zeros_like(matrix[..., 0])
    right[..., -1] = 1
    w = _on_simplex(torch.linalg.solve_ex(matrix, right)[0][..., :-1], free)
    slope = (G[..., None, :, :] @ w[..., None])[..., 0]
    level = (w * slope).sum(-1, keepdim=True)
    off = torch.where(free > 0, (slope - level).abs(), (level - slope).clamp(min=0))
    return _least(off.amax(-1), w, -2)


def _on_simplex(w: Tensor, free: Tensor) -> Tensor:
    """The nearest that is easily had, so that every candidate is allowed: non-negative, of sum 1."""
    w = torch.where(w.isfinite(), w, 0.0).clamp(min=0) * free
    total = w.sum(-1, keepdim=True)
    return torch.where(total > 0, w / total, free / free.sum(-1, keepdim=True))


def min_linear_plus_norm(gramian: Tensor, linear: Tensor, scale: Tensor) -> Tensor:
    r"""`\arg\min_w b^\top w + s \sqrt{w^\top G w}` over the simplex, (..., K).

    On a support, with `p = G^{-1} 1` and `q = G^{-1} b`, stationarity has a solution in closed form:
    `w = (\lambda p - q) / \delta`, `\lambda = (1^\top q + \delta) / 1^\top p` and
    `\delta^2 = 1^\top p \, s^2 - 1^\top p \, b^\top q + (1^\top q)^2`.

    Args:
        gramian: (..., K, K).
        linear: (..., K), the `b`, which must be a combination of the Gramian's columns.
        scale: (...), `s >= 0`.
    """
    if gramian.shape[-1] > MOST:
        return _linear_plus_norm_by_quadprog(gramian, linear, scale)
    ridge = _RIDGE * diagonal(gramian).amax(-1)[..., None, None]
    G = gramian + ridge * torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device)
    free = _subsets(G.shape[-1], G)[1:]
    b = free * linear[..., None, :]
    right = torch.stack([free.expand_as(b), b], -1)
    p, q = torch.linalg.solve_ex(_system(G, free), right)[0].unbind(-1)
    P, Q, R = ((x * y).sum(-1, keepdim=True) for x, y in ((free, p), (free, q), (b, q)))
    delta = (P * scale[..., None, None].square() - P * R + Q.square()).sqrt()
    w = _on_simplex((p * (Q + delta) / P - q) / delta, free)
    # With no support stationary, zero is in the hull: its shortest vector is the answer.
    w = torch.cat([w, min_norm(gramian)[..., None, :]], -2)
    norm = (w * (w @ gramian)).sum(-1).clamp(min=0).sqrt()
    return _least((w * linear[..., None, :]).sum(-1) + scale[..., None] * norm, w, -2)


def _quadprog() -> Any:
    try:
        import quadprog
    except ImportError as error:
        hint = f"more than {MOST} gradients need quadprog: pip install 'unlearn-kernels[surgery]'"
        raise ImportError(hint) from error
    return quadprog


def _above_by_quadprog(C: Tensor, u: Tensor) -> Tensor:
    import numpy as np

    K = C.shape[-1]
    matrices = C.reshape(-1, K, K).cpu().numpy()
    lowers = u.reshape(len(matrices), -1, K).cpu().numpy()
    solve, eye, zero = _quadprog().solve_qp, np.eye(K), np.zeros(K)
    rows = [solve(c, zero, eye, low)[0] for c, some in zip(matrices, lowers, strict=True) for low in some]
    return torch.from_numpy(np.stack(rows)).to(C.device).reshape(u.shape)


def _simplex_by_quadprog(G: Tensor, linear: Tensor) -> Tensor:
    """The least point of `w^T G w / 2 + b^T w` over the simplex."""
    import numpy as np

    K = G.shape[-1]
    matrices, linears = G.reshape(-1, K, K).cpu().numpy(), linear.reshape(-1, K).cpu().numpy()
    sides = np.concatenate([np.ones((K, 1)), np.eye(K)], 1)
    bounds = np.array([1.0] + [0.0] * K)
    solve = _quadprog().solve_qp
    rows = [solve(g, -b, sides, bounds, meq=1)[0] for g, b in zip(matrices, linears, strict=True)]
    return torch.from_numpy(np.stack(rows)).to(G.device).reshape(linear.shape).clamp(min=0)


def _linear_plus_norm_by_quadprog(gramian: Tensor, linear: Tensor, scale: Tensor) -> Tensor:
    """`sqrt(q) <= (q / t + t) / 2`, with equality at `t = sqrt(q)`: programs that close in on it."""
    ridge = _RIDGE * diagonal(gramian).amax(-1)[..., None, None]
    eye = torch.eye(gramian.shape[-1], dtype=gramian.dtype, device=gramian.device)
    t = diagonal(gramian).amax(-1).sqrt()
    w = torch.full_like(linear, 1 / gramian.shape[-1])
    for _ in range(200):
        factor = (scale / t.clamp(min=1e-12)).clamp(min=1e-12)[..., None]
        w = _simplex_by_quadprog(gramian + ridge * eye, linear / factor)
        before, t = t, (w * (gramian @ w[..., None])[..., 0]).sum(-1).clamp(min=0).sqrt()
        if bool(((t - before).abs() <= 1e-12 * before).all()):
            break
    return w

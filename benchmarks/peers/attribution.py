"""Products and projections of per-sample gradients by the formulas of attribution packages, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def by_tokens(A1: Tensor, G1: Tensor, A2: Tensor, G2: Tensor) -> Tensor:
    """Pairs by GhostSuite's formula: Gram matrices over all pairs of tokens, (B1, B2)."""
    rows, cols = A1.shape[:2], A2.shape[:2]
    products = (A1.flatten(0, 1) @ A2.flatten(0, 1).T) * (G1.flatten(0, 1) @ G2.flatten(0, 1).T)
    return products.view(*rows, *cols).sum((1, 3))


def materialised(A1: Tensor, G1: Tensor, A2: Tensor, G2: Tensor) -> Tensor:
    """Pairs from the gradients of both sides, all in memory, (B1, B2)."""
    return (G1.mT @ A1).flatten(1) @ (G2.mT @ A2).flatten(1).T


def through_sum(A1: Tensor, G1: Tensor, A2: Tensor, G2: Tensor) -> Tensor:
    """Each sample against the summed gradient V: `sum_t g_t . (V a_t)`, (B1,)."""
    V = G2.flatten(0, 1).T @ A2.flatten(0, 1)
    return (G1 * (A1 @ V.T)).sum((1, 2))


def two_products(A: Tensor, G: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """A two-sided projection as three products: `(G L^T)^T (A R^T)`."""
    return ((G @ left.T).mT @ (A @ right.T)).flatten(1)


def outer_products(A: Tensor, G: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The same by LogIX's formula: an outer product a token, then their sum."""
    return torch.einsum("bti,btj->btij", G @ left.T, A @ right.T).sum(1).flatten(1)

"""Search for the rows of a matrix with the largest, or the smallest, inner product with each query."""

from typing import NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, select
from unlearn_kernels.reference import influence as reference
from unlearn_kernels.reference.dtypes import accumulation_dtype


class TopK(NamedTuple):
    """Scores (Q, k), best first, and the int64 indices (Q, k) of their rows."""

    values: Tensor
    indices: Tensor


def _fake(queries: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    shape = (queries.shape[0], k)
    dtype = accumulation_dtype(queries, rows)
    return queries.new_empty(shape, dtype=dtype), queries.new_empty(shape, dtype=torch.int64)


def _triton(queries: Tensor, rows: Tensor, k: int, largest: bool) -> tuple[Tensor, Tensor]:
    from unlearn_kernels.triton_kernels import influence as kernels

    return kernels.topk(queries, rows, k, largest)


_ops.register_operator(
    "topk",
    "influence",
    "k best of queries rows^T",
    reference=reference.topk,
    fake=_fake,
    triton=_triton,
    cuda=_ops.launcher("influence", "topk", "cuda_kernels"),
)


def topk(
    queries: Tensor, rows: Tensor, k: int, *, largest: bool = True, backend: Backend | None = None
) -> TopK:
    r"""Find the `k` rows with the best inner product with each query, with no Q x N matrix in memory.

    `\operatorname{topk}_n \langle q, r_n \rangle`, the scores compared while they are in cache.

    Args:
        queries: (Q, D), or (D,) for a single one.
        rows: (N, D), any strides; its dtype may differ from the queries' unless one is float64.
        k: how many, at most N.
        largest: the largest products, or the smallest.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        Values (Q, k), float32 (float64 for float64), in descending order (ascending for `largest=False`), and
        indices (Q, k); without the first dimension for a single query. Equal scores are ordered by index. NaN
        counts as larger than every number, as in `torch.topk`: it comes first among the largest, last among
        the smallest. Bits and indices are the same at every thread count. Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `k` is negative or above N, or a tensor requires
            grad.

    Scratch on the CPU: `6 B * min(Q, 192) * D` of queries (8 B in float64; Q rounded up to whole 32), and 0.5 MB,
    `4 B * D` and `16 B * min(Q, 192) * k` a thread.
    """
    q = queries.unsqueeze(0) if queries.dim() == 1 else queries
    _check(q, rows, k)
    values, indices = select("topk", backend, (q, rows))(q, rows, k, largest)
    return TopK(values[0], indices[0]) if queries.dim() == 1 else TopK(values, indices)


def _check(queries: Tensor, rows: Tensor, k: int) -> None:
    for name, x in (("queries", queries), ("rows", rows)):
        if x.dim() != 2:
            raise ValueError(f"{name} must have 2 dimensions, got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, got {x.dtype}")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require grad, there is no backward: pass {name}.detach()")
    both = "queries and rows must"
    if queries.shape[1] != rows.shape[1]:
        raise ValueError(f"{both} have the same width, got {queries.shape[1]} and {rows.shape[1]}")
    if queries.device != rows.device:
        raise ValueError(f"{both} be on one device, got {queries.device} and {rows.device}")
    if queries.dtype != rows.dtype and torch.float64 in (queries.dtype, rows.dtype):
        raise ValueError(f"{both} both be float64 or neither, got {queries.dtype} and {rows.dtype}")
    if not 0 <= k <= rows.shape[0]:
        raise ValueError(f"k must be between 0 and {rows.shape[0]} rows, got {k}")

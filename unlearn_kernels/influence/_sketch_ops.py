"""Registers the operators behind the kinds of projection."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._loader import have_C
from unlearn_kernels.reference import influence, sketches
from unlearn_kernels.reference.dtypes import accumulation_dtype


def _fake_rademacher(g: Tensor, k: int, seed: int, blocks: Tensor | None = None) -> Tensor:
    return g.new_empty(g.shape[0], k, dtype=accumulation_dtype(g))


def _fake_normal(g: Tensor, k: int, seed: int, offset: int) -> Tensor:
    return g.new_empty(g.shape[0], k, dtype=accumulation_dtype(g))


def _fake_adjoint(y: Tensor, dim: int, seed: int, offset: int, normal: bool) -> Tensor:
    return y.new_empty(y.shape[0], dim, dtype=accumulation_dtype(y))


def _fake_sparse(g: Tensor, k: int, terms: int, seed: int, offset: int, inner: int) -> Tensor:
    return g.new_empty(g.shape[0], k, dtype=accumulation_dtype(g))


def _fake_hadamard(g: Tensor, rows: Tensor, seed: int, offset: int) -> Tensor:
    return g.new_empty(g.shape[0], rows.shape[0], dtype=accumulation_dtype(g))


def _fake_tensor(a: Tensor, g: Tensor, bias: bool, k: int, seed: int) -> Tensor:
    return a.new_empty(a.shape[0], k, dtype=accumulation_dtype(a, g))


def _register(
    name: str,
    formula: str,
    reference: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    module: str = "influence_sketch",
) -> None:
    triton = _ops.launcher(module, name)
    _ops.register_operator(name, "influence", formula, reference=reference, fake=fake, triton=triton)


_ops.register_operator(
    "rademacher_project",
    "influence",
    "g P^T / sqrt(k), P = +-1",
    reference=influence.rademacher_project,
    fake=_fake_rademacher,
    triton=_ops.launcher("influence", "rademacher_project"),
    cuda=_ops.launcher("influence", "rademacher_project", "cuda_kernels"),
)
_register(
    "normal_project", "g P^T / sqrt(k), P normal", sketches.normal_project, _fake_normal, "influence_dense"
)
_register("dense_adjoint", "y P / sqrt(k)", sketches.dense_adjoint, _fake_adjoint, "influence_dense")
_register("sparse_project", "sum of +-g_c over each bucket", sketches.sparse_project, _fake_sparse)
_register("hadamard_project", "rows of H diag(+-1) g / sqrt(k)", sketches.hadamard_project, _fake_hadamard)
_register("tensor_sketch", "bucket sums of sum_t g_t a_t^T", sketches.tensor_sketch, _fake_tensor)


def _vmap_of(name: str) -> Callable[..., Any]:
    """A rule that folds a batch of the first argument into its rows; no other may be batched."""

    def rule(info: object, in_dims: tuple[Any, ...], first: Tensor, *others: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(d is not None for d in in_dims[1:]):
            raise NotImplementedError(f"{name}: only the first argument can be batched by vmap")
        x = first.movedim(in_dims[0], 0)
        rows = getattr(torch.ops.unlearn_kernels, name)(x.flatten(0, 1), *others)
        return rows.unflatten(0, x.shape[:2]), 0

    return rule


if have_C:
    for _name in (
        "rademacher_project",
        "cuda_rademacher_project",
        "normal_project",
        "dense_adjoint",
        "sparse_project",
        "hadamard_project",
    ):
        torch.library.register_vmap(f"unlearn_kernels::{_name}", _vmap_of(_name))

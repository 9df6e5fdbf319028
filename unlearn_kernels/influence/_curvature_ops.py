"""Registers the operators behind the products of curvature."""

from collections.abc import Callable

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._loader import have_C
from unlearn_kernels.reference import curvature
from unlearn_kernels.reference.dtypes import accumulation_dtype


def _fake_squared_gradients(a: Tensor, g: Tensor) -> Tensor:
    return a.new_empty(g.shape[2], a.shape[2], dtype=accumulation_dtype(a, g))


def _fake_squared_rows(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], dtype=accumulation_dtype(x))


def _fake_covariance(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1], x.shape[1], dtype=accumulation_dtype(x))


def _fake_datainf(rows: list[Tensor], queries: list[Tensor], norms: Tensor, damping: Tensor) -> Tensor:
    return rows[0].new_empty(queries[0].shape[0], rows[0].shape[0], dtype=torch.float64)


def _register(name: str, formula: str, reference: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    triton = _ops.launcher("influence_curvature", name)
    _ops.register_operator(name, "influence", formula, reference=reference, fake=fake, triton=triton)


_register(
    "squared_gradients",
    "sum_n (sum_t g_nt a_nt^T)^2",
    curvature.squared_gradients,
    _fake_squared_gradients,
)
_register("squared_rows", "sum_b x_b^2", curvature.squared_rows, _fake_squared_rows)
_register("covariance", "x^T x", curvature.covariance, _fake_covariance)
if have_C:
    _ops.register_raw("datainf_scores", _fake_datainf, None)

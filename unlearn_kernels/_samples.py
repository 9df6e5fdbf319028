"""Tiny arguments for every operator: what the self-check runs and the registry's tests go over."""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels.testing import randn

Arguments = tuple[Any, ...]
Maker = Callable[[torch.dtype, str], Arguments]


def _linear_sqnorms(dtype: torch.dtype, device: str) -> Arguments:
    a = randn(3, 5, 7, dtype=dtype, device=device)
    return a, randn(3, 5, 4, dtype=dtype, seed=1, device=device), True, 0


def _tensors(dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = ((5, 3), (7,), (5, 3), (7,))
    return [randn(*shape, dtype=dtype, seed=i, device=device) for i, shape in enumerate(shapes)]


def _gramian(dtype: torch.dtype, device: str) -> Arguments:
    return _tensors(dtype, device), 2


def _combine_(dtype: torch.dtype, device: str) -> Arguments:
    tensors = _tensors(dtype, device)
    return tensors[:2], tensors, torch.tensor([0.75, -0.5], dtype=torch.float64)


def _rademacher_project(dtype: torch.dtype, device: str) -> Arguments:
    return randn(3, 70, dtype=dtype, device=device), 40, 7


def _topk(dtype: torch.dtype, device: str) -> Arguments:
    return randn(2, 9, dtype=dtype, device=device), randn(30, 9, dtype=dtype, seed=1, device=device), 4, True


def _head(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = randn(6, 8, dtype=dtype, device=device)
    weight, bias = (
        randn(11, *rest, dtype=dtype, seed=seed, device=device) for seed, rest in ((1, (8,)), (2, ()))
    )
    labels = torch.tensor([0, 10, 3, -100, 5, 5], device=device)
    return h, weight, bias, labels


def _linear_nll_forward(dtype: torch.dtype, device: str) -> Arguments:
    return *_head(dtype, device), -100


def _linear_nll_backward(dtype: torch.dtype, device: str) -> Arguments:
    h, weight, bias, labels = _head(dtype, device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = h.to(wide) @ weight.to(wide).T + bias.to(wide)
    grad = randn(6, dtype=wide, seed=3, device=device)
    return grad, h, weight, bias, labels, logits.logsumexp(-1), -100, True, True


SAMPLES: Final[dict[str, Maker]] = {
    "linear_sqnorms": _linear_sqnorms,
    "gramian": _gramian,
    "combine_": _combine_,
    "rademacher_project": _rademacher_project,
    "topk": _topk,
    "linear_nll_forward": _linear_nll_forward,
    "linear_nll_backward": _linear_nll_backward,
}


def results(call: Callable[..., Any], arguments: Arguments) -> list[Tensor]:
    """What a call returns, as a list; for one that returns nothing, the tensors that it wrote to."""
    returned = call(*arguments)
    if returned is None:
        returned = arguments[0]
    return [returned] if isinstance(returned, Tensor) else list(returned)

"""Tiny arguments for every operator: what the self-check runs and the registry's tests go over."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.testing import randn

Arguments = tuple[Any, ...]
Maker = Callable[[torch.dtype, str], Arguments]


def _linear_sqnorms(dtype: torch.dtype, device: str) -> Arguments:
    a = randn(3, 5, 7, dtype=dtype, device=device)
    return a, randn(3, 5, 4, dtype=dtype, seed=1, device=device), True, 0


def _linear_dots(dtype: torch.dtype, device: str) -> Arguments:
    a, g = randn(3, 5, 7, dtype=dtype, device=device), randn(3, 5, 4, dtype=dtype, seed=1, device=device)
    other = (
        randn(2, 6, 7, dtype=dtype, seed=2, device=device),
        randn(2, 6, 4, dtype=dtype, seed=3, device=device),
    )
    return a, g, *other, False, True, 1


def _linear_weighted_sum(dtype: torch.dtype, device: str) -> Arguments:
    w = torch.tensor([0.5, -1.5, 2.0], dtype=accumulation_dtype(torch.empty(0, dtype=dtype)), device=device)
    a, g, *_ = _linear_sqnorms(dtype, device)
    return a, g, w, True


def _linear_grads(dtype: torch.dtype, device: str) -> Arguments:
    a, g, *_ = _linear_sqnorms(dtype, device)
    return a, g, True


def _linear_two_sided(dtype: torch.dtype, device: str) -> Arguments:
    a, g, *_ = _linear_sqnorms(dtype, device)
    left, right = (
        randn(3, 4, dtype=dtype, seed=2, device=device),
        randn(2, 7, dtype=dtype, seed=3, device=device),
    )
    return a, g, left, right, True


def _linear_sketch(dtype: torch.dtype, device: str) -> Arguments:
    a, g, *_ = _linear_sqnorms(dtype, device)
    return a, g, True, 6, 3


def _ids(device: str) -> Tensor:
    return torch.tensor([[3, 0, 5, 3, 1], [2, 2, 2, 1, 6], [0, 4, 1, 0, 6]], device=device)


def _embedding_sqnorms(dtype: torch.dtype, device: str) -> Arguments:
    return _ids(device), randn(3, 5, 9, dtype=dtype, device=device), 7, 1


def _embedding_dots(dtype: torch.dtype, device: str) -> Arguments:
    ids, g, rows, padding = _embedding_sqnorms(dtype, device)
    return ids, g, ids.flip(0).int(), randn(3, 5, 9, dtype=dtype, seed=1, device=device), rows, padding, False


def _embedding_weighted_sum(dtype: torch.dtype, device: str) -> Arguments:
    ids, g, rows, padding = _embedding_sqnorms(dtype, device)
    w = torch.tensor([0.75, -0.5, 1.25], dtype=torch.float64, device=device)
    return ids, g, w, rows, padding, True


def _norm(dtype: torch.dtype, device: str) -> Arguments:
    x, g = (randn(3, 6, 8, dtype=dtype, seed=i, device=device) for i in (0, 1))
    return x, g, 0, 1, 1e-5, True


# A kernel of 3 x 2, stride (2, 1), padding (1, 1), dilation (1, 2), in two dimensions.
_WINDOW: Final = [1, 3, 2, 1, 2, 1, 0, 1, 1, 1, 1, 2]


def _maps(batch: int, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    a = randn(batch, 4, 1, 6, 5, dtype=dtype, seed=seed, device=device)
    return a, randn(batch, 6, 1, 3, 5, dtype=dtype, seed=seed + 1, device=device)


def _conv_sqnorms(dtype: torch.dtype, device: str) -> Arguments:
    return *_maps(3, dtype, device), _WINDOW, 2, True, 0


def _conv_dots(dtype: torch.dtype, device: str) -> Arguments:
    return *_maps(3, dtype, device), *_maps(2, dtype, device, 2), _WINDOW, 2, True, False


def _conv_grads(dtype: torch.dtype, device: str) -> Arguments:
    return *_maps(3, dtype, device), None, _WINDOW, 2, True


def _tensors(dtype: torch.dtype, device: str) -> list[Tensor]:
    shapes = ((5, 3), (7,), (5, 3), (7,))
    return [randn(*shape, dtype=dtype, seed=i, device=device) for i, shape in enumerate(shapes)]


def _gramian(dtype: torch.dtype, device: str) -> Arguments:
    return _tensors(dtype, device), 2


def _combine(dtype: torch.dtype, device: str) -> Arguments:
    tensors = _tensors(dtype, device)
    return tensors[:2], tensors, torch.tensor([0.75, -0.5], dtype=torch.float64)


def _project_conflict(dtype: torch.dtype, device: str) -> Arguments:
    tensors = _tensors(dtype, device)
    options = [1.0, 0.0, 0.0, 1.0, float("inf"), float("inf"), float("inf"), 0.0, 0.0]
    return tensors[:2], [-x for x in tensors[:1]] + tensors[3:], 0, 0, [], options, 0, 0


def _topk_mask(dtype: torch.dtype, device: str) -> Arguments:
    return _tensors(dtype, device), [0, 9, 20], False, True


def _apply_mask(dtype: torch.dtype, device: str) -> Arguments:
    tensors = _tensors(dtype, device)
    return tensors, [randn(*x.shape, seed=8, device=device) > 0 for x in tensors]


def _surgical_adamw(dtype: torch.dtype, device: str) -> Arguments:
    tensors = [randn(6, seed=i, dtype=dtype, device=device) for i in range(10)]
    params, first, second, gradients = tensors[:2], tensors[2:4], tensors[4:6], tensors[6:]
    steps = [torch.full((1,), 3.0, device=device) for _ in params]
    weights = torch.tensor([1.0, -0.5], dtype=torch.float64, device=device)
    groups = torch.tensor([[0.01, 0.9, 0.99, 1e-3, 0.1, -1.0]] * 2, dtype=torch.float64, device=device)
    return params, first, [x.square() for x in second], steps, gradients, weights, groups, [1, 0], False, 5


def _weighted_gramian(dtype: torch.dtype, device: str) -> Arguments:
    tensors = _tensors(dtype, device)
    scales = torch.tensor([1.5, 2.0], dtype=torch.float64, device=device)
    return tensors, 2, [x.square() for x in tensors[:2]], scales, 1e-2


def _compress(dtype: torch.dtype, device: str) -> Arguments:
    return (_tensors(dtype, device),)


def _compressed(dtype: torch.dtype, device: str) -> Arguments:
    tensors = _tensors(dtype, device)[:2]
    codes = [(40 * randn(*x.shape, seed=8, device=device)).clamp(-127, 127).to(torch.int8) for x in tensors]
    return tensors, codes, [torch.full((1,), 0.05, device=device) for _ in tensors]


def _project_conflict_compressed(dtype: torch.dtype, device: str) -> Arguments:
    tensors, codes, scales = _compressed(dtype, device)
    return [x - 0.1 * c for x, c in zip(tensors, codes, strict=True)], codes, scales


def _rademacher_project(dtype: torch.dtype, device: str) -> Arguments:
    return randn(3, 70, dtype=dtype, device=device), 40, 7


def _normal_project(dtype: torch.dtype, device: str) -> Arguments:
    return randn(3, 70, dtype=dtype, device=device), 40, 7, 16


def _dense_adjoint(dtype: torch.dtype, device: str) -> Arguments:
    return randn(3, 40, dtype=dtype, device=device), 70, 7, 128, True


def _sparse_project(dtype: torch.dtype, device: str) -> Arguments:
    return randn(3, 70, dtype=dtype, device=device), 10, 3, 7, 8, 0


def _hadamard_project(dtype: torch.dtype, device: str) -> Arguments:
    rows = torch.tensor([5, 4097, 0, 70, 8191], device=device)
    return randn(3, 70, dtype=dtype, device=device), rows, 7, 4096


def _tensor_sketch(dtype: torch.dtype, device: str) -> Arguments:
    a, g, *_ = _linear_sqnorms(dtype, device)
    return a, g, True, 16, 7


def _squared_gradients(dtype: torch.dtype, device: str) -> Arguments:
    return _linear_sqnorms(dtype, device)[:2]


def _matrix(dtype: torch.dtype, device: str) -> Arguments:
    return (randn(9, 7, dtype=dtype, device=device),)


def _topk(dtype: torch.dtype, device: str) -> Arguments:
    return randn(2, 9, dtype=dtype, device=device), randn(30, 9, dtype=dtype, seed=1, device=device), 4, True


def _scan_codes(dtype: torch.dtype, device: str) -> Arguments:
    codes = (torch.arange(2 * 9).view(2, 9) * 7919 % 16383 - 8191).to(torch.int16)
    rows = (torch.arange(30 * 5).view(30, 5) * 37 % 256).to(torch.uint8)
    scales = randn(30, 3, seed=1).square() + 0.5
    return *(x.to(device) for x in (codes, torch.tensor([0.5, 1.5]), rows, scales)), 4, 4, True, 3


def _linear_nll(dtype: torch.dtype, device: str) -> Arguments:
    h, weight = randn(6, 8, dtype=dtype, device=device), randn(11, 8, dtype=dtype, seed=1, device=device)
    bias, labels = randn(11, dtype=dtype, seed=2, device=device), torch.tensor([0, 10, 3, -100, 5, 5])
    return h, weight, bias, labels.to(device), -100, 1.5, 4.0


def _rows(kind: int, softcap: float, *more: Any) -> Maker:
    """Arguments of an operator over rows of a head: statistics (kind 0), or against a reference of another width."""

    def make(dtype: torch.dtype, device: str) -> Arguments:
        h, weight, bias, labels, ignore_index, *_ = _linear_nll(dtype, device)
        reference = (
            randn(6, 5, dtype=dtype, seed=3, device=device),
            randn(11, 5, dtype=dtype, seed=4, device=device),
            randn(11, dtype=dtype, seed=5, device=device),
        )
        of = (None,) * 3 if kind == 0 else reference
        return h, weight, bias, *of, labels, ignore_index, 1.5, softcap, kind, 0.75, 0.25, *more

    return make


def _tokens(T: int, dtype: torch.dtype, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, None]:
    h = randn(3, T, 8, dtype=dtype, seed=seed, device=device)
    labels = torch.arange(3 * T).view(3, T) * (seed + 4) % 11
    labels[1, 1:] = labels[2, 0] = -100
    upstream = randn(3, T, seed=seed + 1).to(accumulation_dtype(h)).to(device)
    return h, labels.to(device), upstream, None


def _head(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    return randn(11, 8, dtype=dtype, seed=7, device=device), randn(11, dtype=dtype, seed=8, device=device)


def _lm_head_sqnorms(dtype: torch.dtype, device: str) -> Arguments:
    return *_tokens(5, dtype, 1, device), *_head(dtype, device), -100, 3


def _lm_head_dots(dtype: torch.dtype, device: str) -> Arguments:
    sides = *_tokens(5, dtype, 1, device), *_tokens(4, dtype, 3, device)
    return *sides, *_head(dtype, device), -100, False, 1


def _lm_head_tied_dots(dtype: torch.dtype, device: str) -> Arguments:
    ids = (torch.arange(18).view(3, 6) * 7 % 11).to(device)
    g = randn(3, 6, 8, dtype=dtype, seed=9, device=device)
    return ids, g, *_tokens(5, dtype, 1, device), *_head(dtype, device), 2, -100


def _encode_rows(dtype: torch.dtype, device: str) -> Arguments:
    return randn(5, 19, dtype=dtype, device=device), 4, 6, True, 3, 7


SAMPLES: Final[dict[str, Maker]] = {
    "linear_sqnorms": _linear_sqnorms,
    "linear_dots": _linear_dots,
    "linear_weighted_sum": _linear_weighted_sum,
    "linear_grads": _linear_grads,
    "linear_two_sided": _linear_two_sided,
    "linear_sketch": _linear_sketch,
    "embedding_sqnorms": _embedding_sqnorms,
    "embedding_dots": _embedding_dots,
    "embedding_weighted_sum": _embedding_weighted_sum,
    "norm_sqnorms": _norm,
    "norm_grads": _norm,
    "conv_sqnorms": _conv_sqnorms,
    "conv_dots": _conv_dots,
    "conv_grads": _conv_grads,
    "lm_head_sqnorms": _lm_head_sqnorms,
    "lm_head_dots": _lm_head_dots,
    "lm_head_tied_dots": _lm_head_tied_dots,
    "gramian": _gramian,
    "combine": _combine,
    "project_conflict": _project_conflict,
    "topk_mask": _topk_mask,
    "apply_mask": _apply_mask,
    "surgical_adamw": _surgical_adamw,
    "weighted_gramian": _weighted_gramian,
    "compress": _compress,
    "decompress": _compressed,
    "project_conflict_compressed": _project_conflict_compressed,
    "rademacher_project": _rademacher_project,
    "normal_project": _normal_project,
    "dense_adjoint": _dense_adjoint,
    "sparse_project": _sparse_project,
    "hadamard_project": _hadamard_project,
    "tensor_sketch": _tensor_sketch,
    "squared_gradients": _squared_gradients,
    "squared_rows": _matrix,
    "covariance": _matrix,
    "encode_rows": _encode_rows,
    "topk": _topk,
    "scan_codes": _scan_codes,
    "linear_nll": _linear_nll,
    "linear_stats": _rows(0, 4.0),
    "linear_maxmean": _rows(0, 0.0),
    "linear_kl": _rows(1, 4.0, ((3, 1.0),), "none"),
    "linear_soft_ce": _rows(1, 4.0, ((5, 1.0),), "mean"),
    "linear_softplus": _rows(2, 4.0, ((0, 1.0),), "none"),
}


def results(call: Callable[..., Any], arguments: Arguments, *, differentiable: bool = False) -> list[Tensor]:
    """What a call returns, then its arguments as it left them or, if it has a backward, their gradients."""
    leaves = [x for x in tensors_in(arguments) if x.is_floating_point()]
    if not differentiable:
        return [*tensors_in(call(*arguments)), *leaves]
    for x in leaves:
        x.requires_grad_()
    returned = list(tensors_in(call(*arguments)))
    smooth = [x for x in returned if x.requires_grad]
    upstream = [randn(*x.shape, dtype=x.dtype, seed=9, device=x.device.type) for x in smooth]
    gradients = torch.autograd.grad(smooth, leaves, upstream, allow_unused=True)
    return [*returned, *(x for x in gradients if x is not None)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and tuples, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)

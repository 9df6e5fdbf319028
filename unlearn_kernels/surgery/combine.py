"""Weighted sums of gradient sets."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery._lists import SCOPES, Scope


def _triton(
    out: Sequence[Tensor],
    tensors: Sequence[Tensor],
    weights: Tensor,
    scope: int = 0,
    groups: Sequence[int] = (),
) -> None:
    from unlearn_kernels.triton_kernels import surgery as kernels

    kernels.combine_(out, tensors, weights, scope, groups)


_ops.register_operator(
    "combine",
    "surgery",
    "sum_k w_k g_k over lists of tensors",
    reference=reference.combine_,
    fake=None,
    triton=_triton,
    cuda=_ops.launcher("surgery", "combine_", "cuda_kernels"),
    op="combine_",
)


Weights = Tensor | Sequence[float] | Sequence[Sequence[float]]


def _weights(weights: Weights, shape: tuple[int, ...], device: torch.device) -> Tensor:
    w = torch.as_tensor(weights, dtype=torch.float64, device=device).contiguous()
    if w.shape != shape:
        each = "one entry a set" if len(shape) == 1 else "a row a segment with one entry a set"
        raise ValueError(f"weights must have {each}, shape {shape}, got {tuple(w.shape)}")
    return w


def _combine(
    out: Sequence[Tensor] | None,
    sets: Sequence[Sequence[Tensor]],
    weights: Weights,
    scope: Scope,
    groups: Sequence[Hashable] | None,
    backend: Backend | None,
) -> Sequence[Tensor]:
    _lists.check_choice("scope", scope, tuple(SCOPES))
    if not sets:
        raise ValueError("sets must hold at least one list of tensors, got none")
    numbers, by = _lists.group_numbers(scope, groups, len(sets[0])), SCOPES[scope]
    names = _lists.names_of(sets)
    call = _lists.kernel("combine", backend, names, sets) if any(sets) else None
    with torch.no_grad():
        if call is None:
            return [] if out is None else out
        shape = (_lists.segments(by, sets[0], numbers), len(sets)) if by else (len(sets),)
        w = _weights(weights, shape, sets[0][0].device)
        target = [torch.empty_like(x) for x in sets[0]] if out is None else list(out)
        flat = [x for tensors in sets for x in tensors]
        _lists.written(["sets[0]", *names], target, flat, lambda: call(target, flat, w, by, numbers))
    return target


def combine_(
    sets: Sequence[Sequence[Tensor]],
    weights: Weights,
    *,
    scope: Scope = "global",
    groups: Sequence[Hashable] | None = None,
    backend: Backend | None = None,
) -> None:
    r"""Writes the weighted sum of K gradients into the first of them, in one pass and with no temporary.

    .. math:: g_0 \leftarrow \sum_k w_k g_k

    Each element is summed in float64 where its tensor in `sets[0]` is float32 or any is float64, otherwise in
    float32, and rounded once to the dtype of `sets[0]`. NaN and Inf pass through as in the formula, also with
    weight 0. A tensor of `sets[0]` may be the same view in other sets at the same place. Not differentiable.

    Args:
        sets: K lists of N tensors. Shapes agree across the sets; dtypes and strides need not.
        weights: K numbers, or a tensor (K,), used in float64; one that is on the device stays there. For other
            scopes (S, K): a row for each Gramian that `gramian` returns.
        scope: `global`, one row of weights for all tensors; `group`, `tensor` and `row` as in `gramian`.
        groups: for the scope `group`, a label for each of the N tensors.
        backend: see `unlearn_kernels.use_backend`.

    Raises:
        ValueError: if lengths, shapes, dtypes, devices or the number of weights or groups do not fit, or if a tensor of
            `sets[0]` overlaps in memory with itself or with any other tensor in another way.

    Scratch: 16384 bytes a thread.
    """
    _combine(sets[0] if sets else None, sets, weights, scope, groups, backend)


def combine(
    sets: Sequence[Sequence[Tensor]],
    weights: Weights,
    *,
    scope: Scope = "global",
    groups: Sequence[Hashable] | None = None,
    backend: Backend | None = None,
) -> list[Tensor]:
    r"""The weighted sum of K gradients, `\sum_k w_k g_k`, as new tensors like those of `sets[0]`.

    Arguments, precision and errors are those of `combine_`, which does it in place.
    """
    return list(_combine(None, sets, weights, scope, groups, backend))

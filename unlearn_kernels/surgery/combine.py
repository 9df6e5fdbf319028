"""Weighted sums of gradient sets."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.surgery import _lists


def _triton(out: Sequence[Tensor], tensors: Sequence[Tensor], weights: Tensor) -> None:
    from unlearn_kernels.triton_kernels import surgery as kernels

    kernels.combine_(out, tensors, weights)


_ops.register_operator(
    "combine",
    "surgery",
    "sum_k w_k g_k over lists of tensors",
    reference=reference.combine_,
    fake=None,
    triton=_triton,
    op="combine_",
)


def _weights(weights: Tensor | Sequence[float], sets: int, device: torch.device) -> Tensor:
    w = torch.as_tensor(weights, dtype=torch.float64, device=device).contiguous()
    if w.shape != (sets,):
        raise ValueError(f"weights must have one entry a set, shape ({sets},), got {tuple(w.shape)}")
    return w


def _combine(
    out: Sequence[Tensor] | None,
    sets: Sequence[Sequence[Tensor]],
    weights: Tensor | Sequence[float],
    backend: Backend | None,
) -> Sequence[Tensor]:
    if not sets:
        raise ValueError("sets must hold at least one list of tensors, got none")
    names = _lists.names_of(sets)
    call = _lists.kernel("combine", backend, names, sets) if any(sets) else None
    with torch.no_grad():
        w = _weights(weights, len(sets), sets[0][0].device if call else torch.device("cpu"))
        target = [torch.empty_like(x) for x in sets[0]] if out is None else list(out)
        if call is None:
            return target
        flat = [x for tensors in sets for x in tensors]
        _lists.written(["sets[0]", *names], target, flat, lambda: call(target, flat, w))
    return target


def combine_(
    sets: Sequence[Sequence[Tensor]], weights: Tensor | Sequence[float], *, backend: Backend | None = None
) -> None:
    r"""Writes the weighted sum of K gradients into the first of them, in one pass and with no temporary.

    .. math:: g_0 \leftarrow \sum_k w_k g_k

    Each element is summed in float64 where its tensor in `sets[0]` is float32 or any is float64, otherwise in
    float32, and rounded once to the dtype of `sets[0]`. NaN and Inf pass through as in the formula, also with
    weight 0. A tensor of `sets[0]` may be the same view in other sets at the same place. Not differentiable.

    Args:
        sets: K lists of N tensors. Shapes agree across the sets; dtypes and strides need not.
        weights: K numbers, or a tensor (K,), used in float64; one that is on the device stays there.
        backend: see `unlearn_kernels.use_backend`.

    Raises:
        ValueError: if lengths, shapes, dtypes, devices or the number of weights do not fit, or if a tensor of
            `sets[0]` overlaps in memory with itself or with any other tensor in another way.

    Scratch: 16384 bytes a thread.
    """
    _combine(sets[0] if sets else None, sets, weights, backend)


def combine(
    sets: Sequence[Sequence[Tensor]], weights: Tensor | Sequence[float], *, backend: Backend | None = None
) -> list[Tensor]:
    r"""The weighted sum of K gradients, `\sum_k w_k g_k`, as new tensors like those of `sets[0]`.

    Arguments, precision and errors are those of `combine_`, which does it in place.
    """
    return list(_combine(None, sets, weights, backend))

"""Inner products of gradient sets."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.surgery import _lists

Scope = Literal["global"]


def _fake(tensors: Sequence[Tensor], sets: int) -> Tensor:
    return tensors[0].new_empty((sets, sets), dtype=torch.float64)


def _triton(tensors: Sequence[Tensor], sets: int) -> Tensor:
    from unlearn_kernels.triton_kernels import surgery as kernels

    return kernels.gramian(tensors, sets)


_ops.register_operator(
    "gramian",
    "surgery",
    "G_ab = <g_a, g_b> over lists of tensors",
    reference=reference.gramian,
    fake=_fake,
    triton=_triton,
)


def gramian(
    sets: Sequence[Sequence[Tensor]], *, scope: Scope = "global", backend: Backend | None = None
) -> Tensor:
    r"""Inner products of K gradients, each a list of tensors taken as one long vector, in one pass.

    .. math:: G_{ab} = \sum_i \langle g_a^{(i)}, g_b^{(i)} \rangle

    Args:
        sets: K lists of N tensors. Shapes agree across the sets; dtypes (float32, float64, bfloat16,
            float16) and strides need not.
        scope: `global`, one Gramian over all tensors.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (K, K) float64, symmetric, on the device of the tensors. Sums of up to 1024 products in float32
        (float64 where a tensor is), beyond that in float64; the same bits at every number of threads.
        Squares neither overflow nor underflow. NaN and Inf pass through. Not differentiable.

    Raises:
        ValueError: if there is no set, lengths, shapes, dtypes or devices do not fit, or `scope` is
        unknown.

    Scratch: `8 K (K + 1) / 2` bytes for every 16384 elements and `8192 K` bytes a thread.
    """
    _lists.check_scope(scope)
    if not sets:
        raise ValueError("sets must hold at least one list of tensors, got none")
    if not any(sets):
        return torch.zeros(len(sets), len(sets), dtype=torch.float64)
    call = _lists.kernel("gramian", backend, _lists.names_of(sets), sets)
    with torch.no_grad():
        return call([x for tensors in sets for x in tensors], len(sets))

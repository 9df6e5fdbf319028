"""Inner products of gradient sets."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery._lists import SCOPES, Scope


def _fake(tensors: Sequence[Tensor], sets: int, scope: int = 0, groups: Sequence[int] = ()) -> Tensor:
    segments = _lists.segments(scope, tensors[: len(tensors) // sets], groups)
    shape = (segments, sets, sets) if scope else (sets, sets)
    return tensors[0].new_empty(shape, dtype=torch.float64)


def _triton(tensors: Sequence[Tensor], sets: int, scope: int = 0, groups: Sequence[int] = ()) -> Tensor:
    from unlearn_kernels.triton_kernels import surgery as kernels

    return kernels.gramian(tensors, sets, scope, groups)


_ops.register_operator(
    "gramian",
    "surgery",
    "G_ab = <g_a, g_b> over lists of tensors",
    reference=reference.gramian,
    fake=_fake,
    triton=_triton,
    cuda=_ops.launcher("surgery", "gramian", "cuda_kernels"),
)


def gramian(
    sets: Sequence[Sequence[Tensor]],
    *,
    scope: Scope = "global",
    groups: Sequence[Hashable] | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of K gradients, each a list of tensors taken as one long vector, in one pass.

    .. math:: G_{ab} = \sum_i \langle g_a^{(i)}, g_b^{(i)} \rangle

    Args:
        sets: K lists of N tensors. Shapes agree across the sets; dtypes (float32, float64, bfloat16,
            float16) and strides need not.
        scope: what one Gramian goes over: `global`, all tensors; `group`, those of one label; `tensor`, one;
            `row`, one index of a tensor's first dimension (a vector is one row).
        groups: for the scope `group`, a label for each of the N tensors.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (K, K) float64, symmetric, on the device of the tensors; for the other scopes (S, K, K), S being the
        number of labels in the order of their first appearance, N, or the number of rows of all tensors. Sums
        of up to 1024 products in float32 (float64 where a tensor is), beyond that in float64; the same bits at
        every number of threads. Squares neither overflow nor underflow. NaN and Inf pass through. Not
        differentiable.

    Raises:
        ValueError: if there is no set, lengths, shapes, dtypes or devices do not fit, `scope` is unknown, or
        `groups` does not fit.

    Scratch: `8 K (K + 1) / 2` bytes for every 16384 elements and `8192 K` bytes a thread.
    """
    _lists.check_choice("scope", scope, tuple(SCOPES))
    if not sets:
        raise ValueError("sets must hold at least one list of tensors, got none")
    numbers = _lists.group_numbers(scope, groups, len(sets[0]))
    if not any(sets):
        leading = () if scope == "global" else (0,)
        return torch.zeros(*leading, len(sets), len(sets), dtype=torch.float64)
    call = _lists.kernel("gramian", backend, _lists.names_of(sets), sets)
    with torch.no_grad():
        return call([x for tensors in sets for x in tensors], len(sets), SCOPES[scope], numbers)

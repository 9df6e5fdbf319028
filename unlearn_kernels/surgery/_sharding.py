"""Gramians of gradients that are spread over processes: partial sums, one all-reduce."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.surgery._lists import Scope, group_numbers
from unlearn_kernels.surgery.gramian import gramian


def is_dtensor(x: Tensor) -> bool:
    """Whether `x` is a `DTensor`, without importing what builds of torch may lack."""
    return hasattr(x, "_local_tensor")


def local(x: Any) -> Tensor:
    """What this process holds of a gradient, in the same memory."""
    return x.to_local() if is_dtensor(x) else x


def settled(x: Any) -> Any:
    """A gradient with sums that are due over processes (`Partial`) carried out."""
    if not is_dtensor(x) or not any(placement.is_partial() for placement in x.placements):
        return x
    from torch.distributed.tensor import Replicate

    return x.redistribute(placements=[Replicate() if p.is_partial() else p for p in x.placements])


def process_group(given: dist.ProcessGroup | None, gradients: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The processes that hold the parts: those given, all of them for a `DTensor`, none otherwise."""
    if given is None and any(is_dtensor(x) for x in gradients):
        return dist.group.WORLD
    return given


def share(parameter: Any, gradient: Any, processes: int) -> float:
    """By what this process's products count, so that each part of a parameter counts once in the sum of all.

    Replicas are divided by their number. A plain tensor is replicated unless it has Megatron's mark.
    """
    if is_dtensor(gradient):
        parts = 1
        for dimension, placement in enumerate(gradient.placements):
            # Not `is_shard()`, which a strided shard (FSDP2 over tensor parallel) denies.
            parts *= 1 if placement.is_replicate() else gradient.device_mesh.size(dimension)
        return parts / processes
    return 1.0 if getattr(parameter, "tensor_model_parallel", False) else 1 / processes


def summed(
    sets: Sequence[Sequence[Tensor]],
    shares: Sequence[float],
    group: dist.ProcessGroup,
    scope: Scope,
    groups: Sequence[int] | None,
    backend: Backend | None,
) -> Tensor:
    """The Gramian of the whole gradients, from this process's parts of them.

    Args:
        sets: K lists of N local tensors.
        shares: what `share` says of each of N.
        group: who holds the parts.
        scope: of `gramian`; not `row`.
        groups: of `gramian`.
        backend: of `gramian`.

    Returns:
        (K, K), or (S, K, K) for a scope of S segments, the same on all processes.

    Raises:
        ValueError: for the scope `row`.
    """
    if scope == "row":
        raise ValueError(
            "scope must be global, group or tensor for gradients spread over processes, got 'row'"
        )
    if scope == "global":
        partial = _by_share(sets, shares, lambda part: gramian(part, backend=backend))
    else:
        count = torch.tensor(shares, dtype=torch.float64).to(sets[0][0].device, non_blocking=True)
        partial = gramian(sets, scope="tensor", backend=backend) * count[:, None, None]
        if groups is not None:
            partial = _by_group(partial, groups)
    return _all_reduced(partial, group)


def _by_share(
    sets: Sequence[Sequence[Tensor]], shares: Sequence[float], call: Callable[[Sequence[Any]], Tensor]
) -> Tensor:
    total = torch.zeros(len(sets), len(sets), dtype=torch.float64, device=sets[0][0].device)
    for one in sorted(set(shares)):
        part = [[x for x, s in zip(tensors, shares, strict=True) if s == one] for tensors in sets]
        total += one * call(part)
    return total


def _by_group(gramians: Tensor, groups: Sequence[int]) -> Tensor:
    """Sums over groups, in one order: adding at an index is not, on CUDA."""
    numbers = group_numbers("group", groups, len(gramians))
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    sizes = [numbers.count(k) for k in range(max(numbers) + 1)]
    index = torch.tensor(order).to(gramians.device, non_blocking=True)
    return torch.stack([part.sum(0) for part in gramians[index].split(sizes)])


def _all_reduced(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over processes of symmetric matrices: K (K + 1) / 2 numbers each travel, in one call."""
    K = partial.shape[-1]
    rows, columns = torch.triu_indices(K, K, device=partial.device)
    half = partial[..., rows, columns].contiguous()
    dist.all_reduce(half, group=group)
    whole = torch.empty_like(partial)
    whole[..., rows, columns] = half
    whole[..., columns, rows] = half
    return whole

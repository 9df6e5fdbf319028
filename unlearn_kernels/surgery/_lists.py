"""Checks of gradient lists, shared by the surgery operators."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor

from unlearn_kernels import _loader, _ops
from unlearn_kernels._backends import FLOATS, REGISTRY, Backend, select

T = TypeVar("T")
Scope = Literal["global", "group", "tensor", "row"]
SCOPES: Final = {"global": 0, "group": 1, "tensor": 2, "row": 3}  # as the raw operators number them


def names_of(sets: Sequence[Any]) -> list[str]:
    """What error messages call each of `sets`."""
    return [f"sets[{k}]" for k in range(len(sets))]


def kernel(
    operator: str,
    backend: Backend | None,
    names: Sequence[str],
    lists: Sequence[Sequence[Tensor]],
    places: Sequence[int] | None = None,
) -> Callable[..., Any]:
    """The implementation of `operator` for these lists, not all empty, having checked that they agree.

    The C++ kernels look at shapes and dtypes themselves. Hundreds of tensors are therefore not gone through
    here, which would take as long as reading a few million elements, unless a kernel refuses.

    Args:
        operator: its name in the registry.
        backend: what the caller asked for.
        names: what the caller knows the lists as.
        lists: as many lists of tensors.
        places: where the tensors stood in the caller's lists, if some were left out.

    Raises:
        ValueError: here or when the kernel is called, if the lists differ in length or in a tensor's shape,
            or hold what is no floating-point tensor of one device.
    """
    _check_lengths(names, lists)  # so that none is empty
    first = lists[0][:1]
    on_cpu = not torch.compiler.is_compiling() and all(x.is_cpu for tensors in lists for x in tensors)
    if on_cpu and first[0].dtype in FLOATS:
        call = select(operator, backend, first)
        if call is REGISTRY[operator].impls["cpp"].call:
            return _explained(call, names, lists, places)
    return select(operator, backend, _check(names, lists, places))


def _explained(call: Callable[..., Any], *lists: Any) -> Callable[..., Any]:
    """`call`, whose refusal is told in the caller's words where the lists are what it refuses."""

    def run(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RuntimeError:
            _check(*lists)
            raise

    return run


def _check_lengths(names: Sequence[str], lists: Sequence[Sequence[Tensor]]) -> None:
    for name, tensors in zip(names[1:], lists[1:], strict=True):
        if len(tensors) != len(lists[0]):
            got = f"{len(lists[0])} and {len(tensors)}"
            raise ValueError(f"{names[0]} and {name} must have the same length, got {got}")


def _check(
    names: Sequence[str], lists: Sequence[Sequence[Tensor]], places: Sequence[int] | None
) -> list[Tensor]:
    """One tensor of each dtype and device, having checked shapes, dtypes and devices."""
    first = lists[0]
    for name, tensors in zip(names[1:], lists[1:], strict=True):
        for i, (a, b) in enumerate(zip(first, tensors, strict=True)):
            if a.shape != b.shape:
                i = places[i] if places else i
                got = f"{tuple(a.shape)} and {tuple(b.shape)}"
                raise ValueError(f"{names[0]}[{i}] and {name}[{i}] must have one shape, got {got}")
    kinds = {(x.dtype, x.device): x for tensors in lists for x in tensors}
    if len({device for _, device in kinds}) > 1 or any(dtype not in FLOATS for dtype, _ in kinds):
        for name, tensors in zip(names, lists, strict=True):
            for i, x in enumerate(tensors):
                _check_kind(f"{name}[{places[i] if places else i}]", x, first[0].device)
    return list(kinds.values())


def _check_kind(name: str, x: Tensor, device: torch.device) -> None:
    if x.dtype not in FLOATS:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device} like the first tensor, got {x.device}")


def written(
    names: Sequence[str],
    out: Sequence[Tensor],
    rest: Sequence[Tensor],
    call: Callable[[], T],
    places: Sequence[int] | None = None,
) -> T:
    """`call()`, which writes to `out` and reads `rest`, lists of its length. Where the operator refuses
    because memory overlaps, a ValueError says which tensors do."""
    if not (torch.compiler.is_compiling() or torch.is_inference_mode_enabled()):
        torch.autograd.graph.increment_version(out)  # backward passes that saved these must notice
    try:
        return call()
    except RuntimeError as error:
        clash = _clash(out, rest)
        if clash is None:
            raise
        at, (i, j), n = places or range(len(out)), clash, len(out)
        other = f"{names[1 + j // n]}[{at[j % n]}]" if j >= 0 else "itself or another tensor of that list"
        raise ValueError(f"{names[0]}[{at[i]}] is written and overlaps in memory with {other}") from error


def _clash(out: Sequence[Tensor], rest: Sequence[Tensor]) -> tuple[int, int] | None:
    if not _loader.have_C or torch.compiler.is_compiling():
        return None
    i, j = _ops.raw("find_clash")(list(out), list(rest))
    return None if i < 0 else (i, j)


def group_numbers(scope: str, groups: Sequence[Hashable] | None, count: int) -> list[int]:
    """The number of each tensor's group, in the order of first appearance; none for another scope.

    Raises:
        ValueError: if `groups` has no label for each of `count` tensors, or is not what the scope asks for.
    """
    if (groups is not None) != (scope == "group"):
        raise ValueError(f"groups must be given for scope 'group' and for no other, got scope {scope!r}")
    if groups is None:
        return []
    if len(groups) != count:
        raise ValueError(f"groups must have one label for each of {count} tensors, got {len(groups)}")
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in groups]


def segments(scope: int, tensors: Sequence[Tensor], groups: Sequence[int]) -> int:
    """How many segments the raw operators make of a list."""
    if scope == SCOPES["group"]:
        return max(groups) + 1
    if scope == SCOPES["row"]:
        return sum(x.shape[0] if x.dim() > 1 else 1 for x in tensors)
    return len(tensors) if scope == SCOPES["tensor"] else 1


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises ValueError naming the argument and what exists."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")

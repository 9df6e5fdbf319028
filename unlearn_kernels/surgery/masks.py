"""Saliency masks: which elements of a gradient are the largest, and a gradient on them alone."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery_masks as reference
from unlearn_kernels.surgery import _lists

MaskScope = Literal["global", "tensor"]
Masks = list[Tensor | None]


def _fake_topk(tensors: Sequence[Tensor], counts: Sequence[int], by_tensor: bool, bits: bool) -> list[Tensor]:
    masks = len(counts) // (len(tensors) if by_tensor else 1)
    return [
        x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)
        if bits
        else x.new_empty(x.shape, dtype=torch.bool)
        for _ in range(masks)
        for x in tensors
    ]


def _triton_topk(
    tensors: Sequence[Tensor], counts: Sequence[int], by_tensor: bool, bits: bool
) -> list[Tensor]:
    from unlearn_kernels.triton_kernels.surgery import masks as kernels

    return kernels.topk_mask(tensors, counts, by_tensor, bits)


def _triton_apply(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    from unlearn_kernels.triton_kernels.surgery import masks as kernels

    kernels.apply_mask_(tensors, masks)


_ops.register_operator(
    "topk_mask",
    "surgery",
    "the k elements of largest |x| over lists of tensors",
    reference=reference.topk_mask,
    fake=_fake_topk,
    triton=_triton_topk,
    cuda=_ops.launcher("surgery", "topk_mask", "cuda_kernels"),
)
_ops.register_operator(
    "apply_mask",
    "surgery",
    "x = 0 where the mask is 0, over lists of tensors",
    reference=reference.apply_mask_,
    fake=None,
    triton=_triton_apply,
    op="apply_mask_",
)


def _counts(elements: int, fractions: Sequence[float]) -> list[int]:
    for fraction in fractions:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
    return [int(elements * fraction) for fraction in fractions]


@overload
def topk_mask(
    tensors: Sequence[Tensor | None],
    fraction: float,
    *,
    scope: MaskScope = "global",
    bits: bool = False,
    backend: Backend | None = None,
) -> Masks: ...


@overload
def topk_mask(
    tensors: Sequence[Tensor | None],
    fraction: Sequence[float],
    *,
    scope: MaskScope = "global",
    bits: bool = False,
    backend: Backend | None = None,
) -> list[Masks]: ...


def topk_mask(
    tensors: Sequence[Tensor | None],
    fraction: float | Sequence[float],
    *,
    scope: MaskScope = "global",
    bits: bool = False,
    backend: Backend | None = None,
) -> Masks | list[Masks]:
    r"""Masks of exactly the `k = int(n * fraction)` elements of largest magnitude, `n` of them in all.

    `k` is rounded down, from the product in double precision, as in SalUn's code. Elements of equal magnitude
    are taken in order: by tensor, then by index (row by row, whatever the strides). NaN comes after every
    number: it is taken only where there are fewer than `k` numbers.

    Args:
        tensors: N tensors, float32, float64, bfloat16 or float16, mixed as they come, such as gradients summed
            over the forget set. `None` takes no part and has no mask.
        fraction: between 0 and 1; several of them share the first histogram and the last pass.
        scope: `global`, k elements of all tensors together; `tensor`, of each.
        bits: 1 bit an element instead of a byte.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        A mask a tensor, for several fractions a list of them each: bool of the tensor's shape, or with `bits`
        uint8 of `ceil(n / 8)` elements, where element `i` is bit `i % 8` (the lowest first) of byte `i // 8`
        and unused bits are 0, as `numpy.packbits(..., bitorder="little")` has it. The same bits at every
        number of threads.

    Raises:
        ValueError: if a tensor is of another dtype or device, a fraction is out of range, or `scope` is unknown.

    A radix selection: passes of 11 bits over the bits of `|x|`, three for lists without float64, each of which
    counts only what the ones before left open, and one that writes. Scratch: 32 KB a thread and fraction, 8
    bytes a fraction for every 16384 elements, and a copy of tensors that are not contiguous.

    Source: SalUn, Fan et al. 2024 (arXiv 2310.12508), github.com/OPTML-Group/Unlearn-Saliency.
    """
    _lists.check_choice("scope", scope, ("global", "tensor"))
    fractions = [fraction] if isinstance(fraction, float | int) else list(fraction)
    present = [x for x in tensors if x is not None]
    sizes = [x.numel() for x in present] if scope == "tensor" else [sum(x.numel() for x in present)]
    by_size = [_counts(n, fractions) for n in sizes]
    counts = [by_size[i][f] for f in range(len(fractions)) for i in range(len(sizes))]
    found: list[Tensor] = []
    if present and fractions:
        places = [i for i, x in enumerate(tensors) if x is not None]
        call = _lists.kernel("topk_mask", backend, ["tensors"], [present], places)
        with torch.no_grad():
            found = call(present, counts, scope == "tensor", bits)
    masks = iter(found)
    lists: list[Masks] = [[None if x is None else next(masks) for x in tensors] for _ in fractions]
    return lists[0] if isinstance(fraction, float | int) else lists


def _check_masks(pairs: Sequence[tuple[int, Tensor, Tensor]]) -> None:
    for i, x, mask in pairs:
        if mask.dtype not in (torch.bool, torch.uint8):
            raise ValueError(f"mask[{i}] must be bool, or uint8 for bits, got {mask.dtype}")
        shape = x.shape if mask.dtype == torch.bool else ((x.numel() + 7) // 8,)
        if mask.shape != shape:
            kind = "bool" if mask.dtype == torch.bool else "bits"
            raise ValueError(f"mask[{i}] ({kind}) must have shape {tuple(shape)}, got {tuple(mask.shape)}")
        if mask.device != x.device:
            raise ValueError(f"mask[{i}] must be on {x.device} like its tensor, got {mask.device}")


def apply_mask_(
    tensors: Sequence[Tensor | None], mask: Sequence[Tensor | None], *, backend: Backend | None = None
) -> None:
    r"""Sets to zero, in place and in one pass, the elements whose mask is 0.

    What is masked becomes +0 whatever it was: a product with the mask would leave -0, and NaN of NaN and Inf.

    Args:
        tensors: N gradients (float32, float64, bfloat16 or float16), or `None`.
        mask: a mask a tensor, bool of its shape or bits, as `topk_mask` gives them. `None` leaves the tensor
            alone.
        backend: see `unlearn_kernels.use_backend`.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not fit, or a tensor overlaps in memory with itself
            or another one.

    Scratch: a copy of tensors and masks that are not contiguous.
    """
    if len(tensors) != len(mask):
        raise ValueError(f"tensors and mask must have the same length, got {len(tensors)} and {len(mask)}")
    pairs = [
        (i, x, m)
        for i, (x, m) in enumerate(zip(tensors, mask, strict=True))
        if x is not None and m is not None
    ]
    if not pairs:
        return
    _check_masks(pairs)
    places, xs, masks = (list(part) for part in zip(*pairs, strict=True))
    call = _lists.kernel("apply_mask", backend, ["tensors"], [xs], places)
    with torch.no_grad():
        _lists.written(["tensors"], xs, [], lambda: call(xs, masks), places)

"""Per-sample gradients of a convolution in plain formulas. `window` holds kernel, stride, padding and dilation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels.reference.dtypes import accumulation_dtype


def unfold(a: Tensor, out: Sequence[int], window: Sequence[int], groups: int) -> Tensor:
    """The input (B, C, D, H, W) as the matrix that is multiplied, (B, groups, out positions, C / groups * kernel).

    What lies outside of the input is zero, however far the output reaches.
    """
    kernel, stride, padding, dilation = (window[i : i + 3] for i in (0, 3, 6, 9))
    pads: list[int] = []
    for i in (2, 1, 0):
        reach = (out[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1
        pads += [padding[i], max(reach - padding[i] - a.shape[2 + i], 0)]
    a = torch.nn.functional.pad(a, pads)
    for i in range(3):
        offsets = torch.arange(kernel[i], device=a.device)[:, None] * dilation[i]
        index = offsets + torch.arange(out[i], device=a.device) * stride[i]
        a = a.index_select(2 + 2 * i, index.flatten()).unflatten(2 + 2 * i, (kernel[i], out[i]))
    columns = a.permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5).flatten(2, 4)  # (B, C, kernel, positions)
    return columns.unflatten(1, (groups, -1)).flatten(2, 3).mT


def _grads(a: Tensor, g: Tensor, window: Sequence[int], groups: int) -> tuple[Tensor, Tensor]:
    """Weight (B, groups, O / groups, C / groups * kernel) and bias (B, O)."""
    dtype = accumulation_dtype(a, g)
    a, g = a.to(dtype), g.to(dtype)
    upstream = g.flatten(2).unflatten(1, (groups, -1))
    return upstream @ unfold(a, g.shape[2:], window, groups), g.sum((2, 3, 4))


def conv_grads(
    a: Tensor, g: Tensor, w: Tensor | None, window: Sequence[int], groups: int, bias: bool
) -> tuple[Tensor, Tensor]:
    """Every gradient (B, O, C / groups, *kernel) and (B, O), or `sum_i w_i` of them; no bias: 0 columns."""
    weight, offset = _grads(a, g, window, groups)
    weight = weight.flatten(1, 2).unflatten(-1, (a.shape[1] // groups, *window[:3]))
    offset = offset if bias else offset[:, :0]
    if w is None:
        return weight, offset.contiguous()
    return torch.tensordot(w, weight, 1), w @ offset


def conv_sqnorms(a: Tensor, g: Tensor, window: Sequence[int], groups: int, bias: bool, method: int) -> Tensor:
    """`|W_i|^2`, (B,); every method has the same value."""
    weight, offset = conv_grads(a, g, None, window, groups, bias)
    return weight.square().flatten(1).sum(1) + offset.square().sum(1)


def conv_dots(
    a1: Tensor,
    g1: Tensor,
    a2: Tensor,
    g2: Tensor,
    window: Sequence[int],
    groups: int,
    bias: bool,
    summed: bool,
) -> Tensor:
    """`<W_i, W'_j>`, (B1, B2), or with `sum_j W'_j`, (B1,)."""
    first, second = (
        torch.cat([x.flatten(1) for x in conv_grads(a, g, None, window, groups, bias)], 1)
        for a, g in ((a1, g1), (a2, g2))
    )
    return first @ second.sum(0) if summed else first @ second.T

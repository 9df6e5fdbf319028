"""What a convolution layer's arguments mean, checked: each error is a `ValueError` that names the argument."""

from collections.abc import Sequence
from typing import Final, NamedTuple

from torch import Tensor

from unlearn_kernels.per_sample._checks import check_floats

Sizes = int | Sequence[int]
Padding = str | Sizes
_MOST_DIMENSIONS: Final = 3


class Window(NamedTuple):
    """Kernel, stride, padding before the first element, and dilation, by depth, height and width; and the groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def numbers(self) -> list[int]:
        """The 12 numbers that the operators take."""
        return [*self.kernel, *self.stride, *self.padding, *self.dilation]


def _sizes(name: str, value: Sizes, dimensions: int, least: int) -> tuple[int, ...]:
    sizes = (value,) * dimensions if isinstance(value, int) else tuple(value)
    if len(sizes) != dimensions or any(not isinstance(size, int) or size < least for size in sizes):
        raise ValueError(
            f"{name} must be an integer of at least {least} or {dimensions} of them, got {value!r}"
        )
    return sizes


def _padding(
    padding: Padding, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> tuple:
    """Padding on both sides together, and before the first element."""
    if not isinstance(padding, str):
        before = _sizes("padding", padding, len(kernel), 0)
        return tuple(2 * size for size in before), before
    if padding not in ("same", "valid"):
        raise ValueError(f"padding must be 'same', 'valid' or integers, got {padding!r}")
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if any(step != 1 for step in stride):
        raise ValueError(f"padding 'same' needs a stride of 1, got {tuple(stride)}")
    both = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return both, tuple(size // 2 for size in both)


def window_of(
    A: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
) -> tuple[Window, tuple[int, ...]]:
    """The window in three dimensions, and the spatial shape of the output that it makes of `A`."""
    if padding_mode != "zeros":
        raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
    if not 3 <= A.dim() <= 2 + _MOST_DIMENSIONS:
        raise ValueError(f"A must have 3 to 5 dimensions (batch, channels, *spatial), got {tuple(A.shape)}")
    n = A.dim() - 2
    kernel, step = _sizes("kernel_size", kernel_size, n, 1), _sizes("stride", stride, n, 1)
    spread = _sizes("dilation", dilation, n, 1)
    both, before = _padding(padding, kernel, step, spread)
    fields = zip(A.shape[2:], both, spread, kernel, step, strict=True)
    out = tuple((size + pad - d * (k - 1) - 1) // s + 1 for size, pad, d, k, s in fields)
    if any(size < 0 for size in out):
        raise ValueError(
            f"kernel_size {kernel} reaches beyond the padded input, whose shape is {tuple(A.shape)}"
        )
    ones, zeros = (1,) * (_MOST_DIMENSIONS - n), (0,) * (_MOST_DIMENSIONS - n)
    return Window(ones + kernel, ones + step, zeros + before, ones + spread, groups), out


def check_maps(A: Tensor, G: Tensor, window: Window, out: tuple[int, ...], names: tuple[str, str]) -> None:
    """That `G` is the gradient of what the layer makes of `A`."""
    check_floats(**dict(zip(names, (A, G), strict=True)))
    groups, (first, second) = window.groups, names
    if G.dim() != A.dim() or G.shape[0] != A.shape[0] or G.shape[2:] != out:
        wanted = f"({A.shape[0]}, out_channels, {', '.join(map(str, out))})"
        raise ValueError(f"{second} must have shape {wanted}, got {tuple(G.shape)}")
    for name, x in ((first, A), (second, G)):
        if not isinstance(groups, int) or groups < 1 or x.shape[1] % groups:
            raise ValueError(f"groups must divide the channels of {name}, {x.shape[1]}, got {groups!r}")


def in_three_dimensions(x: Tensor) -> Tensor:
    """(batch, channels, depth, height, width), detached; a view."""
    x = x.detach()
    while x.dim() < 2 + _MOST_DIMENSIONS:
        x = x.unsqueeze(2)
    return x

r"""Per-sample gradients of a convolution: `W_i = G_i^T U_i`, with `U_i` the unfolded input, which is never formed.

A layer is named by what `torch.nn.ConvNd` is made with. `A` is its input (B, C, *spatial) and `G` the gradient at its
output (B, O, *out), in one, two or three spatial dimensions; any strides, channels last too; float32, float64,
bfloat16 or float16. Results are float32 (float64 for float64), accumulated in that type; none is differentiable.
With T output positions, d = C / groups * kernel positions, p = O / groups, one gradient takes `2 T d p * groups` FLOPs.

Every function raises `ValueError` if shapes, devices or dtypes do not fit the layer, or `padding_mode` is not zeros.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend, select
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import _conv_ops  # noqa: F401  registers the operators
from unlearn_kernels.per_sample._checks import check_weights
from unlearn_kernels.per_sample._conv_window import (
    Padding,
    Sizes,
    Window,
    check_maps,
    in_three_dimensions,
    window_of,
)
from unlearn_kernels.per_sample._types import Gradients, TwoSided
from unlearn_kernels.per_sample.linear import Choice, Method
from unlearn_kernels.reference.dtypes import accumulation_dtype

_CODES: Final = {"direct": 0, "gram": 1, "rank1": 2, "auto": 3}
# Multiply-adds that packing one element costs as much as: of a panel of positions, and where the kernel is a point.
_PATCH_COST: Final = 24
_POINT_COST: Final = 1
_PROJECTED_BYTES: Final = 16 << 20


class _Call(NamedTuple):
    """One side of a call: maps in three dimensions, and the layer."""

    a: Tensor
    g: Tensor
    window: Window
    dimensions: int

    @property
    def layer(self) -> tuple[list[int], int]:
        return self.window.numbers(), self.window.groups


def _call(
    A: Tensor,
    G: Tensor,
    kernel_size: Sizes,
    stride: Sizes,
    padding: Padding,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
    names: tuple[str, str] = ("A", "G"),
) -> _Call:
    window, out = window_of(A, kernel_size, stride, padding, dilation, groups, padding_mode)
    check_maps(A, G, window, out, names)
    return _Call(in_three_dimensions(A), in_three_dimensions(G), window, A.dim() - 2)


def _choice(call: _Call) -> Choice:
    positions, groups = call.g.shape[2:].numel(), call.window.groups
    kernel = call.window.kernel[0] * call.window.kernel[1] * call.window.kernel[2]
    d, p = call.a.shape[1] // groups * kernel, call.g.shape[1] // groups
    direct = float(groups * positions * d * p)
    packing = _POINT_COST if kernel == 1 else _PATCH_COST
    gram = groups * positions * ((positions + 16) / 2 + packing) * (d + p)
    return Choice("rank1" if positions == 1 else "gram" if gram < direct else "direct", direct, gram)


def explain(
    A: Tensor,
    G: Tensor,
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Choice:
    """The method that `sqnorms` takes when left to choose, with the modelled multiply-adds of each path a sample.

    `direct` takes `T d p groups`; `gram` about `T^2 / 2 (d + p) groups`, and packs more for each of them.
    """
    return _choice(_call(A, G, kernel_size, stride, padding, dilation, groups, padding_mode))


def sqnorms(
    A: Tensor,
    G: Tensor,
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
    method: Method = "auto",
    backend: Backend | None = None,
) -> Tensor:
    r"""Squared norms of per-sample gradients, with neither gradients nor an unfolded input in memory.

    .. math:: n_i = \Big\| \sum_t g_{it} u_{it}^T \Big\|_F^2 \; \Big( + \Big\| \sum_t g_{it} \Big\|^2 \Big)

    Args:
        A: layer inputs, (B, C, *spatial).
        G: gradients at the layer's outputs, (B, O, *out).
        kernel_size: one integer or one a dimension, as the next three.
        stride: steps of the window.
        padding: zeros on each side, `same` or `valid`.
        dilation: distance between the kernel's elements.
        groups: blocks of channels that are convolved apart.
        padding_mode: only `zeros`.
        bias: adds the bias gradient's squared norm.
        method: `direct` forms tiles of the gradient and squares them; `gram` multiplies tiles of `U U^T` and
            `G G^T`, cheaper where T is small; `rank1` is `|u|^2 |g|^2`, for T = 1; `auto` takes the cheaper, and
            goes to `direct` for a sample whose Gram sum cancels (see `docs/numerics.md`).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,).

    Raises:
        ValueError: also if `method` is `rank1` with T > 1.

    Scratch: less than 0.6 MB a thread, at most `512 B` bytes of partial sums (`8 B * groups * tiles` for `gram`, a
    tile a square of 192 positions), and `8 B O` for the bias.
    """
    if method not in _CODES:
        raise ValueError(f"method must be one of {', '.join(_CODES)}, got {method!r}")
    call = _call(A, G, kernel_size, stride, padding, dilation, groups, padding_mode)
    positions = call.g.shape[2:].numel()
    if method == "rank1" and positions != 1:
        raise ValueError(f"method 'rank1' needs one output position a sample, got {positions}")
    chosen = _choice(call).method if method == "auto" else method
    code = _CODES["auto" if (method, chosen) == ("auto", "gram") else chosen]
    return select("conv_sqnorms", backend, (A, G))(call.a, call.g, *call.layer, bias, code)


def dots(
    A1: Tensor,
    G1: Tensor,
    A2: Tensor,
    G2: Tensor,
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    summed: bool = False,
    bias: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of the per-sample gradients of two batches, `\langle W_i, W'_j \rangle`.

    Gradients are formed tile by tile, all pairs are multiplied while their tiles are in cache, and the tiles are
    dropped: exact whatever cancels, at `2 (B1 + B2) T d p + 2 B1 B2 d p` FLOPs a group. With `summed`, the tile of
    the second batch is the sum over its samples.

    Args:
        A1: inputs of the first batch, (B1, C, *spatial).
        G1: output gradients of the first batch.
        A2: inputs of the second batch, (B2, C, *spatial); spatial sizes may differ from the first's.
        G2: output gradients of the second batch.
        kernel_size: the layer's, as in `sqnorms`.
        stride: the layer's.
        padding: the layer's.
        dilation: the layer's.
        groups: the layer's.
        padding_mode: the layer's.
        summed: multiply with the one gradient that the second batch adds up to.
        bias: adds the product of the bias gradients.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B1, B2), or (B1,) when summed.

    Raises:
        ValueError: also if the two batches differ in channels, device or type.

    Scratch: `sqnorms`'s, and a thread's tiles of all the second batch's gradients, together with one more at most
    4 MB, or 9 KB a sample if that is more; partial sums, at most 4 MB or `128 B1 B2` bytes.
    """
    arguments = kernel_size, stride, padding, dilation, groups, padding_mode
    first, second = _call(A1, G1, *arguments, ("A1", "G1")), _call(A2, G2, *arguments, ("A2", "G2"))
    for name, x, y in (("A", A1, A2), ("G", G1, G2)):
        if x.dim() != y.dim() or x.shape[1] != y.shape[1]:
            raise ValueError(
                f"{name}1 and {name}2 must have the same channels and dimensions, "
                f"got {tuple(x.shape)} and {tuple(y.shape)}"
            )
    if A1.device != A2.device or accumulation_dtype(A1) != accumulation_dtype(A2):
        raise ValueError(
            f"A1 and A2 must be on one device and both be float64 or neither, "
            f"got {A1.device}, {A1.dtype} and {A2.device}, {A2.dtype}"
        )
    call = select("conv_dots", backend, (A1, G1, A2, G2))
    return call(first.a, first.g, second.a, second.g, *first.layer, bias, summed)


def _gradients(call: _Call, w: Tensor | None, bias: bool, backend: Backend | None) -> Gradients:
    weight, offset = select("conv_grads", backend, (call.a, call.g))(call.a, call.g, w, *call.layer, bias)
    shape = *weight.shape[:-3], *call.window.kernel[3 - call.dimensions :]
    return Gradients(weight.reshape(shape), offset if bias else None)


def weighted_sum(
    A: Tensor,
    G: Tensor,
    w: Tensor,
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
    backend: Backend | None = None,
) -> Gradients:
    r"""The weighted sum of per-sample gradients, `\sum_i w_i W_i`, in one product: no second backward.

    Args:
        A: layer inputs, (B, C, *spatial).
        G: gradients at the layer's outputs, (B, O, *out).
        w: one weight a sample, (B,).
        kernel_size: the layer's, as in `sqnorms`.
        stride: the layer's.
        padding: the layer's.
        dilation: the layer's.
        groups: the layer's.
        padding_mode: the layer's.
        bias: whether the bias gradient is wanted as well.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        The weight's gradient (O, C / groups, *kernel) and the bias's (O,) or None, in the dtype of `G`, rounded once.

    Scratch: less than 0.3 MB a thread and `8 B O` bytes for the bias; the weights are multiplied into the panels.
    Source: book-keeping, Bu et al. 2023 (arXiv 2210.00038).
    """
    call = _call(A, G, kernel_size, stride, padding, dilation, groups, padding_mode)
    check_weights(w, A, A.shape[0])
    found = _gradients(call, w.detach().to(accumulation_dtype(A, G)).contiguous(), bias, backend)
    return Gradients(found.weight.to(G.dtype), None if found.bias is None else found.bias.to(G.dtype))


def grads(
    A: Tensor,
    G: Tensor,
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
    backend: Backend | None = None,
) -> Gradients:
    """Every sample's gradient, for those who want them in memory: (B, O, C / groups, *kernel), and (B, O) or None.

    Arguments are those of `sqnorms`. Scratch: `sqnorms`'s, beside the result.
    """
    call = _call(A, G, kernel_size, stride, padding, dilation, groups, padding_mode)
    return _gradients(call, None, bias, backend)


def project(
    A: Tensor,
    G: Tensor,
    projection: Projection | TwoSided,
    *,
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    bias: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Projections of the per-sample gradients, a few samples' gradients in memory at a time.

    Args:
        A: layer inputs, (B, C, *spatial).
        G: gradients at the layer's outputs, (B, O, *out).
        projection: an `influence.Projection` of the flattened weight gradient, row-major, followed by the bias's;
            or `TwoSided(left, right)`, `W_i \mapsto L W_i R^T` for `W_i` as a matrix (O, C / groups * kernel).
        kernel_size: the layer's, as in `sqnorms`.
        stride: the layer's.
        padding: the layer's.
        dilation: the layer's.
        groups: the layer's.
        padding_mode: the layer's.
        bias: whether the projection takes in the bias gradient; not with `TwoSided`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, k), with k = k_o k_i for `TwoSided`, row-major.

    Raises:
        ValueError: also if the projection's sizes are not the gradient's.

    Scratch: gradients of at most 16 MB, or of one sample if that is more (twice that with the bias).
    """
    call = _call(A, G, kernel_size, stride, padding, dilation, groups, padding_mode)
    _check_projection(projection, call, bias)
    dtype = accumulation_dtype(A, G)
    parameters = call.g.shape[1] * (_columns(call) + bias)
    chunk = max(1, _PROJECTED_BYTES // max(1, parameters * dtype.itemsize))
    k = projection.k if isinstance(projection, Projection) else len(projection.left) * len(projection.right)
    out = A.new_empty(A.shape[0], k, dtype=dtype)
    for start in range(0, A.shape[0], chunk):
        part = call._replace(a=call.a[start : start + chunk], g=call.g[start : start + chunk])
        out[start : start + chunk] = _project_gradients(
            _gradients(part, None, bias, backend), projection, backend
        )
    return out


def _columns(call: _Call) -> int:
    kernel = call.window.kernel
    return call.a.shape[1] // call.window.groups * kernel[0] * kernel[1] * kernel[2]


def _check_projection(projection: Projection | TwoSided, call: _Call, bias: bool) -> None:
    rows, columns = call.g.shape[1], _columns(call)
    if isinstance(projection, TwoSided):
        left, right = projection
        if bias:
            raise ValueError("bias must be False with a TwoSided projection, got True")
        if left.dim() != 2 or left.shape[1] != rows or right.dim() != 2 or right.shape[1] != columns:
            raise ValueError(
                f"projection must be (k_o, {rows}) and (k_i, {columns}), "
                f"got {tuple(left.shape)} and {tuple(right.shape)}"
            )
    elif projection.dim != rows * (columns + bias):
        raise ValueError(f"projection must have dim {rows * (columns + bias)}, got {projection.dim}")


def _project_gradients(g: Gradients, projection: Projection | TwoSided, backend: Backend | None) -> Tensor:
    if isinstance(projection, TwoSided):
        left, right = (x.detach().to(g.weight.dtype) for x in projection)
        return (left @ g.weight.flatten(2) @ right.T).flatten(1)
    flat = [g.weight.flatten(1)] if g.bias is None else [g.weight.flatten(1), g.bias]
    return projection.project(torch.cat(flat, 1) if len(flat) > 1 else flat[0], backend=backend)

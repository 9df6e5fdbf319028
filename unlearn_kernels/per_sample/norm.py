r"""Per-sample gradients of LayerNorm, RMSNorm and GroupNorm: `\sum_t \hat x_{it} g_{it}` and `\sum_t g_{it}`."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, select
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample._checks import check_floats, check_weights
from unlearn_kernels.per_sample._types import Gradients
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import norm as reference

Kind = Literal["layer", "rms", "group"]
_CODES: Final = {"layer": reference.LAYER, "rms": reference.RMS, "group": reference.GROUP}


def _fake_sqnorms(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    return x.new_empty(x.shape[0], dtype=accumulation_dtype(x, g))


def _fake_grads(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    scales = x.shape[1] if kind == reference.GROUP else x.shape[2]
    return x.new_empty(x.shape[0], 1 + bias, scales, dtype=accumulation_dtype(x, g))


def _triton_sqnorms(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import norm as kernels

    return kernels.norm_sqnorms(x, g, kind, groups, eps, bias)


def _triton_grads(x: Tensor, g: Tensor, kind: int, groups: int, eps: float, bias: bool) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import norm as kernels

    return kernels.norm_grads(x, g, kind, groups, eps, bias)


_ops.register_operator(
    "norm_sqnorms",
    "per_sample",
    "|sum_t x_hat_t g_t|^2 (+ |sum_t g_t|^2)",
    reference=reference.norm_sqnorms,
    fake=_fake_sqnorms,
    triton=_triton_sqnorms,
)
_ops.register_operator(
    "norm_grads",
    "per_sample",
    "sum_t x_hat_t g_t, sum_t g_t",
    reference=reference.norm_grads,
    fake=_fake_grads,
    triton=_triton_grads,
)


class _Layer(NamedTuple):
    """The arguments of a raw operator, and the shape of the layer's scale."""

    x: Tensor
    g: Tensor
    kind: int
    groups: int
    eps: float
    scale: torch.Size

    def call(self, op: str, bias: bool, backend: Backend | None) -> Tensor:
        call: Tensor = select(op, backend, (self.x, self.g))(*self[:5], bias)
        return call


def _layer(
    X: Tensor,
    G: Tensor,
    kind: Kind,
    eps: float,
    num_groups: int | None,
    normalized_shape: int | Sequence[int] | None,
) -> _Layer:
    """X and G as (B, T, d) tokens or (B, C, S) channels."""
    if kind not in _CODES:
        raise ValueError(f"kind must be one of {', '.join(_CODES)}, got {kind!r}")
    check_floats(X=X, G=G)
    if X.shape != G.shape:
        raise ValueError(f"X and G must have the same shape, got {tuple(X.shape)} and {tuple(G.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if kind == "group":
        groups, scale = _groups(X, num_groups, normalized_shape), X.shape[1:2]
        shape = (X.shape[0], X.shape[1], X.shape[2:].numel())
    else:
        groups, scale = 1, _scale_shape(X, kind, num_groups, normalized_shape)
        shape = (X.shape[0], X.shape[1 : X.dim() - len(scale)].numel(), scale.numel())
    return _Layer(
        X.detach().reshape(shape), G.detach().reshape(shape), _CODES[kind], groups, float(eps), scale
    )


def _groups(X: Tensor, num_groups: int | None, normalized_shape: object) -> int:
    if normalized_shape is not None:
        raise ValueError(f"normalized_shape must be None for kind 'group', got {normalized_shape}")
    if num_groups is None or num_groups < 1 or X.shape[1] % num_groups != 0:
        raise ValueError(f"num_groups must divide the {X.shape[1]} channels, got {num_groups}")
    return num_groups


def _scale_shape(
    X: Tensor, kind: str, num_groups: int | None, normalized_shape: int | Sequence[int] | None
) -> torch.Size:
    if num_groups is not None:
        raise ValueError(f"num_groups must be None for kind {kind!r}, got {num_groups}")
    if normalized_shape is None:
        return X.shape[-1:]
    scale = torch.Size((normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape)
    if not 0 < len(scale) < X.dim() or X.shape[-len(scale) :] != scale:
        raise ValueError(
            f"normalized_shape must be the last dimensions of X {tuple(X.shape)}, got {tuple(scale)}"
        )
    return scale


def sqnorms(
    X: Tensor,
    G: Tensor,
    *,
    kind: Kind = "layer",
    eps: float,
    num_groups: int | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    bias: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Squared norms of per-sample gradients of a normalisation layer's scale (and bias).

    .. math:: n_i = \Big\| \sum_t \hat x_{it} \odot g_{it} \Big\|^2 \; \Big( + \Big\| \sum_t g_{it} \Big\|^2 \Big)

    with `\hat x` the normalised input: `(x - mean) / sqrt(var + eps)` of a token (`layer`) or of a group of
    channels (`group`), `x / sqrt(mean(x^2) + eps)` (`rms`). Statistics are taken anew from `X`, in two passes
    over a token while it is in cache, so that `X` and `G` come from memory once. A layer that multiplies by
    `1 + w` (Gemma) has the same gradient, and so has one without statistics saved.

    Args:
        X: the layer's inputs, (B, ..., *normalized_shape), or (B, C, ...) for `group`; any strides; float32,
            float64, bfloat16 or float16.
        G: gradients at its outputs, of the same shape.
        kind: `layer` (`torch.nn.LayerNorm`), `rms` (`torch.nn.RMSNorm` and those of Hugging Face models), or
            `group` (`torch.nn.GroupNorm`; one group is an InstanceNorm over all channels).
        eps: what the layer adds to the variance, or to the mean square.
        num_groups: for `group`.
        normalized_shape: for `layer` and `rms`; the last dimension if None.
        bias: adds the bias gradient's squared norm.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,), float32 (float64 for float64), the same bits at every thread count. Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit the kind.

    Scratch: `24 d` bytes a thread, and `8 d * 32` for fewer than 32 samples (parts of a sample, summed in
    order); for `group` 24 bytes a channel of a group and 8 KB a thread.

    Source: the formulas of `torch.nn`; per-sample gradients by Opacus have the same values and are all in memory.
    """
    return _layer(X, G, kind, eps, num_groups, normalized_shape).call("norm_sqnorms", bias, backend)


def grads(
    X: Tensor,
    G: Tensor,
    *,
    kind: Kind = "layer",
    eps: float,
    num_groups: int | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    bias: bool = False,
    backend: Backend | None = None,
) -> Gradients:
    """Per-sample gradients of the scale and the bias.

    Args:
        X: inputs, as in `sqnorms`.
        G: output gradients.
        kind: as in `sqnorms`.
        eps: as in `sqnorms`.
        num_groups: for `group`.
        normalized_shape: for `layer` and `rms`.
        bias: whether the bias gradient is wanted as well.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        `Gradients(weight, bias)`, each (B, *normalized_shape) or (B, C), float32 (float64 for float64).

    Raises:
        ValueError: as `sqnorms`.

    Scratch: as `sqnorms`.
    """
    layer = _layer(X, G, kind, eps, num_groups, normalized_shape)
    rows = layer.call("norm_grads", bias, backend)
    shape = (rows.shape[0], *layer.scale)
    return Gradients(rows[:, 0].reshape(shape), rows[:, 1].reshape(shape) if bias else None)


def _flat(layer: _Layer, bias: bool, backend: Backend | None) -> Tensor:
    """(B, d), or (B, 2 d) with the bias's gradient after the scale's."""
    return layer.call("norm_grads", bias, backend).flatten(1)


def dots(
    X1: Tensor,
    G1: Tensor,
    X2: Tensor,
    G2: Tensor,
    *,
    kind: Kind = "layer",
    eps: float,
    num_groups: int | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    summed: bool = False,
    bias: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of per-sample gradients, through the gradients: they are small, (B, d).

    Args:
        X1: inputs of side 1, as in `sqnorms`.
        G1: output gradients of side 1.
        X2: inputs of side 2; positions may differ in number from side 1.
        G2: output gradients of side 2.
        kind: as in `sqnorms`.
        eps: as in `sqnorms`.
        num_groups: for `group`.
        normalized_shape: for `layer` and `rms`.
        summed: multiplies every sample of side 1 by the one sum of all gradients of side 2.
        bias: adds the products of the bias gradients.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B1, B2), or (B1,) where `summed`; float32 (float64 for float64), summed in double.

    Raises:
        ValueError: as `sqnorms`, or if the two sides have different scales.

    Scratch: `12 d (B1 + B2)` bytes (twice that with the bias), and that of `sqnorms`.
    """
    one, two = (_layer(x, g, kind, eps, num_groups, normalized_shape) for x, g in ((X1, G1), (X2, G2)))
    if one.scale != two.scale:
        raise ValueError(f"X1 and X2 must have the same scale, got {tuple(one.scale)} and {tuple(two.scale)}")
    if one.x.device != two.x.device:
        raise ValueError(f"X1 and X2 must be on one device, got {one.x.device} and {two.x.device}")
    rows1, rows2 = (_flat(side, bias, backend) for side in (one, two))
    dtype = accumulation_dtype(rows1, rows2)
    right = rows2.double()
    return (rows1.double() @ (right.sum(0) if summed else right.T)).to(dtype)


def weighted_sum(
    X: Tensor,
    G: Tensor,
    w: Tensor,
    *,
    kind: Kind = "layer",
    eps: float,
    num_groups: int | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    bias: bool = False,
    backend: Backend | None = None,
) -> Gradients:
    r"""The weighted sum of per-sample gradients, `\sum_i w_i \nabla_i`, through the gradients.

    Args:
        X: inputs, as in `sqnorms`.
        G: output gradients.
        w: one weight a sample, (B,).
        kind: as in `sqnorms`.
        eps: as in `sqnorms`.
        num_groups: for `group`.
        normalized_shape: for `layer` and `rms`.
        bias: whether the bias gradient is wanted as well.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        `Gradients(weight, bias)` in the layer's shape and the dtype of `G`, summed in double.

    Raises:
        ValueError: as `sqnorms`, or if `w` does not fit.

    Scratch: `12 B d` bytes (twice that with the bias), and that of `sqnorms`.
    """
    layer = _layer(X, G, kind, eps, num_groups, normalized_shape)
    check_weights(w, layer.x, layer.x.shape[0])
    rows = layer.call("norm_grads", bias, backend).double()
    total = (w.detach().double() @ rows.flatten(1)).reshape(rows.shape[1:]).to(G.dtype)
    return Gradients(total[0].reshape(layer.scale), total[1].reshape(layer.scale) if bias else None)


def project(
    X: Tensor,
    G: Tensor,
    projection: Projection,
    *,
    kind: Kind = "layer",
    eps: float,
    num_groups: int | None = None,
    normalized_shape: int | Sequence[int] | None = None,
    bias: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Projections of per-sample gradients, through the gradients.

    Args:
        X: inputs, as in `sqnorms`.
        G: output gradients.
        projection: of d coordinates (C for `group`), or 2 d with the bias's after the scale's. A vector has
            no two sides, so `TwoSided` does not fit.
        kind: as in `sqnorms`.
        eps: as in `sqnorms`.
        num_groups: for `group`.
        normalized_shape: for `layer` and `rms`.
        bias: whether the bias gradient is projected as well.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, k), float32 (float64 for float64).

    Raises:
        ValueError: as `sqnorms`, or if the projection does not fit.

    Scratch: `4 B d` bytes (twice that with the bias), that of `sqnorms` and that of the projection.
    """
    layer = _layer(X, G, kind, eps, num_groups, normalized_shape)
    size = (1 + bias) * layer.scale.numel()
    if not isinstance(projection, Projection) or projection.dim != size:
        raise ValueError(f"projection must be a Projection of {size} coordinates, got {projection}")
    return projection.project(_flat(layer, bias, backend), backend=backend)

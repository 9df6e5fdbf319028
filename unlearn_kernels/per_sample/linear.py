r"""Per-sample gradients of a linear layer: `W_i = \sum_t g_{it} a_{it}^T`, and `b_i = \sum_t g_{it}`."""

from typing import Final, Literal, NamedTuple

from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, select
from unlearn_kernels.per_sample._checks import check_floats, check_weights, folded
from unlearn_kernels.per_sample._types import Gradients
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import linear as reference

Method = Literal["auto", "direct", "gram", "rank1"]
_CODES: Final = {"direct": 0, "gram": 1, "rank1": 2, "auto": 3}


class Choice(NamedTuple):
    """The method that `auto` takes and the multiply-adds of each, a sample."""

    method: str
    direct: float
    gram: float


def _fake(a: Tensor, g: Tensor, bias: bool, method: int) -> Tensor:
    return a.new_empty(a.shape[0], dtype=accumulation_dtype(a, g))


def _triton(a: Tensor, g: Tensor, bias: bool, method: int) -> Tensor:
    from unlearn_kernels.triton_kernels.per_sample import linear as kernels

    return kernels.linear_sqnorms(a, g, bias, method)


_ops.register_operator(
    "linear_sqnorms",
    "per_sample",
    "|sum_t g_t a_t^T|^2 (+ |sum_t g_t|^2)",
    reference=reference.linear_sqnorms,
    fake=_fake,
    triton=_triton,
)


def _folded(A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """`A` and `G` with every dimension between the first and the last folded into one."""
    check_floats(A=A, G=G)
    if A.shape[:-1] != G.shape[:-1]:
        raise ValueError(
            f"A and G must agree in all dimensions but the last, got {tuple(A.shape)} and {tuple(G.shape)}"
        )
    return folded(A), folded(G)


def _choice(A: Tensor, G: Tensor) -> Choice:
    tokens, d, p = A.shape[1], A.shape[2], G.shape[2]
    direct = float(tokens * d * p)
    # Half of the symmetric products, in register tiles about 16 wide; one more pass for the cancellation test.
    gram = tokens * (tokens + 16) / 2 * (d + p) + tokens * (d + p)
    return Choice("rank1" if tokens == 1 else "gram" if gram < direct else "direct", direct, gram)


def explain(A: Tensor, G: Tensor) -> Choice:
    """The method that `sqnorms(A, G)` takes when left to choose, with the modelled cost of each path.

    Costs are multiply-adds of one sample: `T d p` for `direct`, about `T^2 (d + p) / 2` for `gram`.
    """
    return _choice(*_folded(A, G))


def sqnorms(
    A: Tensor, G: Tensor, *, bias: bool = False, method: Method = "auto", backend: Backend | None = None
) -> Tensor:
    r"""Squared norms of per-sample gradients, with no gradient in memory.

    .. math:: n_i = \Big\| \sum_t g_{it} a_{it}^T \Big\|_F^2 \; \Big( + \Big\| \sum_t g_{it} \Big\|^2 \Big)

    Args:
        A: layer inputs, (B, ..., d); any strides; float32, float64, bfloat16 or float16.
        G: gradients at the layer's outputs, (B, ..., p), with the leading dimensions of `A`. What lies between
            the first dimension and the last is summed over (tokens, T in all).
        bias: adds the bias gradient's squared norm.
        method: `direct` forms tiles of the gradient and squares them (2 T d p FLOPs a sample); `gram` multiplies
            tiles of `A A^T` and `G G^T` (T^2 (d + p) FLOPs, symmetric half); `rank1` is
            `|a|^2 |g|^2`, for T = 1; `auto` takes the cheaper, and goes to `direct` for a sample whose Gram sum
            cancels (see `docs/numerics.md`).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B,), float32 (float64 for float64 inputs), accumulated in that type. Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or `method` is `rank1` with T > 1.

    Scratch: less than 0.5 MB a thread plus `8 B * tiles` bytes, whatever T, d and p.

    Sources: Goodfellow 2015 (arXiv 1510.01799) for T = 1; Li et al. 2022 (arXiv 2110.05679) for the Gram form.
    """
    if method not in _CODES:
        raise ValueError(f"method must be one of {', '.join(_CODES)}, got {method!r}")
    a, g = _folded(A, G)
    if method == "rank1" and a.shape[1] != 1:
        raise ValueError(f"method 'rank1' needs one token a sample, got {a.shape[1]}")
    chosen = _choice(a, g).method if method == "auto" else method
    code = _CODES["auto" if (method, chosen) == ("auto", "gram") else chosen]
    return select("linear_sqnorms", backend, (a, g))(a.detach(), g.detach(), bias, code)


def weighted_sum(A: Tensor, G: Tensor, w: Tensor, *, bias: bool = False) -> Gradients:
    r"""The weighted sum of per-sample gradients, `\sum_i w_i W_i`, in one product: no second backward.

    Args:
        A: layer inputs, (B, ..., d).
        G: gradients at the layer's outputs, (B, ..., p).
        w: one weight a sample, (B,).
        bias: whether the bias gradient is wanted as well.

    Returns:
        The weight's gradient (p, d) and the bias's (p,) or None, in the dtype of `G`.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: a scaled copy of `G`.

    Source: book-keeping, Bu et al. 2023 (arXiv 2210.00038).
    """
    a, g = _folded(A, G)
    check_weights(w, a, a.shape[0])
    scaled = (g * w.to(g.dtype)[:, None, None]).flatten(0, 1)
    return Gradients(scaled.T @ a.flatten(0, 1).to(g.dtype), scaled.sum(0) if bias else None)

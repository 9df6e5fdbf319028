r"""Per-sample gradients of a linear layer: `W_i = \sum_t g_{it} a_{it}^T`, and `b_i = \sum_t g_{it}`."""

from typing import Final, Literal, NamedTuple

from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend, select
from unlearn_kernels.influence.projection import Projection
from unlearn_kernels.per_sample import _costs, _linear_ops  # noqa: F401  registers the operators
from unlearn_kernels.per_sample._checks import check_floats, check_weights, folded
from unlearn_kernels.per_sample._factors import project_factors
from unlearn_kernels.per_sample._types import Gradients, TwoSided
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.reference.per_sample import linear as reference

Method = Literal["auto", "direct", "gram", "rank1"]
DotsMethod = Literal["auto", "tokens", "direct"]
_CODES: Final = {"direct": 0, "gram": 1, "rank1": 2, "auto": 3}
_DOTS_CODES: Final = {"tokens": 0, "direct": 1}


class Choice(NamedTuple):
    """The method that `auto` takes and the multiply-adds of each, a sample."""

    method: str
    direct: float
    gram: float


class DotsChoice(NamedTuple):
    """The method that `auto` takes and the time of each, in multiply-adds of the product core."""

    method: str
    tokens: float
    direct: float


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


def _sides(A1: Tensor, G1: Tensor, A2: Tensor, G2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both sides folded; they may differ in batch and tokens, not in features."""
    check_floats(A1=A1, G1=G1, A2=A2, G2=G2)
    for side, A, G in (("1", A1, G1), ("2", A2, G2)):
        if A.shape[:-1] != G.shape[:-1]:
            raise ValueError(
                f"A{side} and G{side} must agree in all dimensions but the last, "
                f"got {tuple(A.shape)} and {tuple(G.shape)}"
            )
    for name, x, y in (("A", A1, A2), ("G", G1, G2)):
        if x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"{name}1 and {name}2 must agree in the last dimension, got {x.shape[-1]} and {y.shape[-1]}"
            )
    return folded(A1), folded(G1), folded(A2), folded(G2)


def _dots_choice(a1: Tensor, a2: Tensor, outputs: int, summed: bool) -> DotsChoice:
    (samples1, tokens1), (samples2, tokens2) = a1.shape[:2], a2.shape[:2]
    sizes = _costs.Sizes(samples1, tokens1, samples2, tokens2, a1.shape[2], outputs, summed)
    tokens, direct = _costs.tokens(sizes).cost, _costs.direct(sizes).cost
    return DotsChoice("tokens" if tokens <= direct else "direct", tokens, direct)


def explain_dots(A1: Tensor, G1: Tensor, A2: Tensor, G2: Tensor, *, summed: bool = False) -> DotsChoice:
    """The method that `dots` takes when left to choose, with the modelled time of each path.

    The model and how its constants were measured: `docs/per_sample.md`.
    """
    a1, g1, a2, _ = _sides(A1, G1, A2, G2)
    return _dots_choice(a1, a2, g1.shape[2], summed)


def dots(
    A1: Tensor,
    G1: Tensor,
    A2: Tensor,
    G2: Tensor,
    *,
    summed: bool = False,
    bias: bool = False,
    method: DotsMethod = "auto",
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of per-sample gradients of two batches, with no gradient in memory.

    .. math:: D_{ij} = \Big\langle \sum_t g_{it} a_{it}^T, \sum_s g'_{js} {a'_{js}}^T \Big\rangle
        = \sum_{t,s} (a_{it} \cdot a'_{js}) (g_{it} \cdot g'_{js})

    Args:
        A1: inputs of the first batch, (B1, ..., d); any strides; float32, float64, bfloat16 or float16.
        G1: gradients at the layer's outputs, (B1, ..., p).
        A2: inputs of the second batch, (B2, ..., d), which may have another number of tokens.
        G2: gradients at the layer's outputs, (B2, ..., p).
        summed: multiplies each sample of the first batch with the sum of the second's gradients.
        bias: adds the inner products of the bias gradients.
        method: `tokens` multiplies tiles of `A A'^T` and of `G G'^T` (2 T T' (d + p) FLOPs a pair); `direct` forms
            tiles of the gradients, those of the smaller batch once and those of the other once for every 16 of
            them, and multiplies the tiles (2 T d p FLOPs a sample, 2 d p a pair); with `summed`, the tiles of the
            sum are formed once. `auto` takes what is faster by a measured model (`explain_dots`).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B1, B2), or (B1,) when summed; float32 (float64 for float64 inputs). Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: less than 1.4 MB a thread, and `8 (B1 + n1) (B2 + n2)` bytes with n1, n2 the numbers of tiles of 192
    and 128 tokens (`tokens`; B2 = 1 when summed) or at most `max(1 MB, 8 B1 B2)` bytes (`direct`).

    Sources: Wang et al. 2024 (arXiv 2406.11011) for products of two batches by tokens.
    """
    if method != "auto" and method not in _DOTS_CODES:
        raise ValueError(f"method must be one of auto, {', '.join(_DOTS_CODES)}, got {method!r}")
    tensors = _sides(A1, G1, A2, G2)
    chosen = _dots_choice(tensors[0], tensors[2], G1.shape[-1], summed).method if method == "auto" else method
    call = select("linear_dots", backend, tensors)
    return call(*(x.detach() for x in tensors), summed, bias, _DOTS_CODES[chosen])


def weighted_sum(
    A: Tensor, G: Tensor, w: Tensor, *, bias: bool = False, backend: Backend | None = None
) -> Gradients:
    r"""The weighted sum of per-sample gradients, `\sum_i w_i W_i`, in one product: no second backward.

    Args:
        A: layer inputs, (B, ..., d).
        G: gradients at the layer's outputs, (B, ..., p).
        w: one weight a sample, (B,); used in float32 (float64 for float64 inputs).
        bias: whether the bias gradient is wanted as well.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        The weight's gradient (p, d) and the bias's (p,) or None, in the dtype of `G`, rounded once from
        float32 (float64). A layer that stores its weight as (d, p), like Hugging Face's `Conv1D`, takes the
        transpose. Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: less than 0.9 MB a thread; the weights are multiplied in while the product packs its panels.

    Source: book-keeping, Bu et al. 2023 (arXiv 2210.00038).
    """
    a, g = _folded(A, G)
    check_weights(w, a, a.shape[0])
    weights = w.detach().to(accumulation_dtype(a)).contiguous()
    weight, offset = select("linear_weighted_sum", backend, (a, g))(a.detach(), g.detach(), weights, bias)
    return Gradients(weight, offset if bias else None)


def grads(A: Tensor, G: Tensor, *, bias: bool = False, backend: Backend | None = None) -> Gradients:
    r"""The per-sample gradients themselves, for those who want them all the same.

    Args:
        A: layer inputs, (B, ..., d).
        G: gradients at the layer's outputs, (B, ..., p).
        bias: whether the bias gradients are wanted as well.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        The weight's gradients (B, p, d) and the bias's (B, p) or None, float32 (float64 for float64 inputs);
        transposed like `weighted_sum` for a weight stored as (d, p). Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: less than 0.9 MB a thread.
    """
    a, g = _folded(A, G)
    weight, offset = select("linear_grads", backend, (a, g))(a.detach(), g.detach(), bias)
    return Gradients(weight, offset if bias else None)


def project(
    A: Tensor,
    G: Tensor,
    projection: Projection | TwoSided,
    *,
    bias: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    r"""Projections of the per-sample gradients, with no gradient in memory.

    .. math:: \mathrm{vec}(W_i)\, P^T / \sqrt k \qquad\text{or}\qquad
        \mathrm{vec}\big( (G_i L^T)^T (A_i R^T) \big) = \mathrm{vec}(L W_i R^T)

    Args:
        A: layer inputs, (B, ..., d).
        G: gradients at the layer's outputs, (B, ..., p).
        projection: an `influence.Projection` of dimension `p d` (`p d + p` with the bias): what it makes of the
            gradient, row by row, then the bias's; or `TwoSided(left, right)` with `left` (k_o, p) and `right`
            (k_i, d), floating-point, any strides.
        bias: takes the bias gradient in; a two-sided projection appends `L b_i`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (B, k), or (B, k_o k_i) for a two-sided projection (k_o more with the bias); float32 (float64 for float64
        inputs). Not differentiable.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: two-sided, at most 1.2 MB a thread, `4 * (192 * (k_o + k_i) + k_o k_i)` bytes and panels for k up to
    256. Signs: `4 * min(B, 32) * (max(6 d, 32768) + 2048)` bytes of coordinates and `12 * min(B, 32) * k` of sums.
    `tensorsketch`: `4 * (3 k + max(d, p)) + 8 k` bytes a thread. Other kinds: 16 MB of gradients.

    Sources: Choe et al. 2024 (arXiv 2405.13954) for the two-sided form; `influence.Projection` for signs.
    """
    a, g = _folded(A, G)
    if isinstance(projection, TwoSided):
        left, right = _projectors(a, g, projection)
        call = select("linear_two_sided", backend, (a, g, left, right))
        return call(a.detach(), g.detach(), left.detach(), right.detach(), bias)
    if not isinstance(projection, Projection):
        raise ValueError(f"projection must be a Projection or TwoSided, got {type(projection).__name__}")
    dim = g.shape[2] * (a.shape[2] + bias)
    if projection.dim != dim:
        raise ValueError(f"projection must have dim {dim}, got {projection.dim}")
    if projection.kind != "rademacher":
        return project_factors(a.detach(), g.detach(), projection, bias, backend)
    call = select("linear_sketch", backend, (a, g))
    return call(a.detach(), g.detach(), bias, projection.k, projection.seed)


def _projectors(a: Tensor, g: Tensor, projection: TwoSided) -> tuple[Tensor, Tensor]:
    check_floats(A=a, left=projection.left, right=projection.right)
    for name, x, features in (
        ("left", projection.left, g.shape[2]),
        ("right", projection.right, a.shape[2]),
    ):
        if x.dim() != 2 or x.shape[1] != features:
            raise ValueError(f"{name} must have shape (k, {features}), got {tuple(x.shape)}")
    return projection.left, projection.right

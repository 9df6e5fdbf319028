r"""Negative log-likelihoods of a linear head: `nll_t = logsumexp_v z_tv - z_{t, y_t}`, `z = h W^T + b`."""

from typing import Final, Literal

from torch import Tensor
from typing_extensions import Unpack

from unlearn_kernels import _ops
from unlearn_kernels._backends import FLOATS, Backend, Impl, Operator, register, select
from unlearn_kernels.reference import token_loss as reference
from unlearn_kernels.reference.dtypes import accumulation_dtype
from unlearn_kernels.token_loss import _sweep
from unlearn_kernels.token_loss._autograd import LinearNll
from unlearn_kernels.token_loss._checks import check_head, check_labels, check_logits, check_words
from unlearn_kernels.token_loss._options import NllOptions

Reduction = Literal["none", "sum", "mean"]
# Bytes of logits kept for backward unless the caller says otherwise, and their greatest share of all logits: memory
# stays constant in tokens, and with what backward itself takes below 0.6 of the logits.
_KEPT_BYTES: Final = 64 << 20
_KEPT_SHARE: Final = 0.35
# Bytes of logits of one sequence up to which a loss of sequences holds them, unless the caller says otherwise.
_SEQUENCE_BYTES: Final = 1 << 30


def _kernels(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float = 1.0,
    softcap: float = 0.0,
    reduction: Reduction = "none",
    memory_budget: int | None = None,
) -> Tensor:
    head, settings = (weight, bias), (ignore_index, scale, softcap)
    if _sweep.wants_gradient(h) and not _sweep.wants_gradient(*head):
        return _reduced(_sweep.frozen_nll(h, *head, labels, *settings), labels, ignore_index, reduction)
    some = labels.numel() > 0  # the mean of none is NaN
    if some and reduction != "none" and _sweep.wants_gradient(h) and _sweep.in_accumulation_type(head):
        shares = _shares(h, labels, ignore_index, reduction)
        return _sweep.weighted_total(shares, h, *head, labels, *settings)
    room = _room(h, weight, memory_budget) if _sweep.wants_gradient(h, *head) else 0
    nll = LinearNll.apply(h, *head, labels, *settings, room)[0]
    return _reduced(nll, labels, ignore_index, reduction)


def _room(h: Tensor, weight: Tensor, memory_budget: int | None) -> int:
    """For how many numbers there is: one a row, and logits to be kept; on a GPU they are always made again."""
    if h.device.type != "cpu":
        return 0
    rows, vocabulary = h.numel() // max(h.shape[-1], 1), weight.shape[0]
    size = accumulation_dtype(h).itemsize
    if memory_budget is None:
        return rows + min(_KEPT_BYTES // size, int(_KEPT_SHARE * rows * vocabulary))
    # Rows of the store are padded, and so is the vocabulary.
    return rows + min(memory_budget // size, (rows + 64) * (vocabulary + 256))


def swept_preference(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    weights: Tensor,
    bounds: Tensor,
    beta: float,
    **options: Unpack[NllOptions],
) -> Tensor | None:
    """`reference.preference` of sequences, its gradients made along with it; None where that does not fit.

    It holds the logits of whole sequences, and gives nothing to a head that takes no gradient or is in half precision.
    """
    bias, ignore_index = options.get("bias"), options.get("ignore_index", -100)
    check_head(h, W, bias)
    labels = check_labels(h, labels)
    settings = check_logits(options.get("scale", 1.0), options.get("softcap"))
    head = (W,) if bias is None else (W, bias)
    chosen = select("linear_nll", options.get("backend"), (h, *head))
    trained = _sweep.wants_gradient(h) and _sweep.wants_gradient(*head)
    if chosen is not _kernels or not trained or _sweep.wants_gradient(weights, bounds):
        return None
    if not _sweep.in_accumulation_type(head) or not _holds_sequences(h, W, labels, options):
        return None
    weights, bounds = (x.to(accumulation_dtype(h)) for x in (weights, bounds))
    try:
        return _sweep.sequence_preference(weights, bounds, beta, h, W, bias, labels, ignore_index, *settings)
    except (RuntimeError, IndexError):
        check_words(labels, W.shape[0], ignore_index)
        raise


def _holds_sequences(h: Tensor, W: Tensor, labels: Tensor, options: NllOptions) -> bool:
    """Whether the logits of one sequence fit the budget, and are no more than half of all."""
    if len(labels) < 2 or labels.numel() == 0:
        return False
    budget = options.get("memory_budget")
    size = accumulation_dtype(h).itemsize * W.shape[0] * (labels.numel() // len(labels))
    return size <= (_SEQUENCE_BYTES if budget is None else budget)


def _reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    scale: float = 1.0,
    softcap: float = 0.0,
    reduction: Reduction = "none",
    memory_budget: int | None = None,
) -> Tensor:
    nll = reference.linear_nll(h, weight, bias, labels, ignore_index, scale, softcap)
    return _reduced(nll, labels, ignore_index, reduction)


def _reduced(nll: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return nll
    return nll.sum() if reduction == "sum" else nll.sum() / (labels != ignore_index).sum()


def _shares(h: Tensor, labels: Tensor, ignore_index: int, reduction: Reduction) -> Tensor:
    """What each token counts in the reduction."""
    kept = (labels != ignore_index).to(accumulation_dtype(h))
    return kept if reduction == "sum" else kept / kept.sum()


register(
    Operator(
        "linear_nll",
        "token_loss",
        "logsumexp_v(h_t W_v + b_v) - (h_t W_y + b_y)",
        {
            "cpp": Impl("cpp", _kernels, ("cpu",), FLOATS, _ops.no_extension),
            "triton": Impl("triton", _kernels, ("cuda",), FLOATS, _ops.no_triton_kernels),
            "reference": Impl("reference", _reference, ("cpu", "cuda")),
        },
        differentiable=True,
    )
)


def linear_nll(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: Reduction = "none",
    memory_budget: int | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Negative log-likelihood of each label under a linear head, with no logits in memory.

    .. math:: n_t = \log \sum_v e^{z_{tv}} - z_{t, y_t}, \qquad
        z_t = c \tanh(x_t / c), \quad x_t = s (W h_t + b)

    with the logit scale s and the soft-cap c (`z = x` without one).

    Nothing is shifted: row t of `h` is judged with label t. Differentiable once, to `h`, `W` and `bias`, for
    any upstream gradient:

    .. math:: \partial n_t / \partial z_t = \mathrm{softmax}(z_t) - e_{y_t}

    Backward computes the logits again (8 N d V FLOPs in all) unless one sweep can make the gradients ahead:
    under `reduction` "sum" or "mean" with `W` and `bias` in float32 or float64 (6 N d V), and for a head that
    takes no gradient, whatever the reduction (4 N d V). A `memory_budget` keeps as many logits between the two
    as fit and saves their share of the 2 N d V; one that holds them all, N V numbers, leaves 6 N d V.

    Rows whose label is ignored are left out of every product.

    Args:
        h: hidden states, (*, d); any strides; float32, float64, bfloat16 or float16.
        W: the head, (V, d); any strides. float64 only together with float64 hidden states.
        labels: (*), integers in [0, V) or `ignore_index`.
        bias: (V,).
        ignore_index: the label of rows that do not count; they get 0, and no gradient.
        scale: what multiplies the logits (Cohere's `logit_scale`, one over Granite's `logits_scaling`).
        softcap: Gemma-2's `final_logit_softcapping`, above 0.
        memory_budget: bytes of logits that may be kept for backward where it would compute them again; by
            default 64 MiB, and 0.35 of the logits at most. On a GPU none are kept.
        reduction: "none"; "sum"; or "mean", over the rows that count (NaN if there are none, as in PyTorch).
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (*), or a scalar if reduced; float32 (float64 for float64 inputs), accumulated in that type. Gradients
        come in the dtypes of what they belong to. The same bits at every number of threads.

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, `reduction` is unknown, `softcap` is not positive,
            `memory_budget` is negative, or a label is neither in [0, V) nor ignored (on CUDA such a row becomes
            NaN instead).
        RuntimeError: if a gradient is differentiated again.

    Scratch on the CPU for N rows that count, in elements of the accumulation type: `N d + N V / 96` forward;
    `3 N d`, a block of logits, 8 MB or N x 384, `256 d` of `W`, and what the budget keeps, backward; in one sweep of R
    rows at a time `R (3 d + V)` and `256 d` of `W`; V with a bias; under 1 MB a thread. R is the largest of N / 6 (at
    most 512), 128 (at most N / 2), 64, and what 8 MB hold, in equal parts of whole registers.

    Sources: Wijmans et al. 2024 (Cut Your Losses, arXiv 2411.09009); Hsu et al. 2024 (Liger Kernel,
    arXiv 2410.10989).
    """
    check_head(h, W, bias)
    labels = check_labels(h, labels)
    settings = check_logits(scale, softcap)
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}")
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget must not be negative, got {memory_budget}")
    tensors = (h, W) if bias is None else (h, W, bias)
    call = select("linear_nll", backend, tensors)
    try:
        return call(h, W, bias, labels, ignore_index, *settings, reduction, memory_budget)
    except (RuntimeError, IndexError):
        check_words(labels, W.shape[0], ignore_index)
        raise

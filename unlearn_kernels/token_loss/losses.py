"""Unlearning losses on top of `linear_nll`, in the dialects of the code they come from."""

from torch import Tensor
from torch.nn import functional

from unlearn_kernels._backends import Backend
from unlearn_kernels.token_loss.linear import linear_nll


def npo(
    h: Tensor,
    W: Tensor,
    labels: Tensor,
    reference_nll: Tensor,
    *,
    beta: float = 0.1,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    r"""Negative preference optimisation of a batch of sequences to be forgotten.

    .. math:: -\frac{2}{\beta} \frac{1}{B} \sum_s \log \sigma\big(\beta (n_s - r_s)\big),
        \qquad n_s = \sum_t n_{st}

    A sequence without labels that count has n_s = 0 and still counts in the mean, as in the sources.

    Args:
        h: hidden states, (B, ..., d), already shifted against `labels`.
        W: the head, (V, d).
        labels: (B, ...).
        reference_nll: r, the same sums under the reference model, (B,).
        beta: inverse temperature, above 0.
        bias: (V,).
        ignore_index: the label of tokens that do not count.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or beta is not positive.

    Scratch: that of `linear_nll`.

    Source: Zhang et al. 2024 (arXiv 2404.05868), equation 3, as in its code and in open-unlearning.
    """
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if labels.dim() < 1 or reference_nll.shape != labels.shape[:1]:
        wanted, got = tuple(labels.shape[:1]), tuple(reference_nll.shape)
        raise ValueError(f"reference_nll must have one value a sequence, {wanted}, got {got}")
    nll = linear_nll(h, W, labels, bias=bias, ignore_index=ignore_index, backend=backend)
    n = nll.reshape(labels.shape[0], -1).sum(1) if nll.numel() else nll.new_zeros(labels.shape[0]) + nll.sum()
    return -2 / beta * functional.logsigmoid(beta * (n - reference_nll.to(n.dtype))).mean()


def grad_diff(
    forget: tuple[Tensor, Tensor],
    retain: tuple[Tensor, Tensor],
    W: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    backend: Backend | None = None,
) -> Tensor:
    r"""Gradient difference: ascent on what is to be forgotten, descent on what is to be kept.

    .. math:: -\frac{\gamma}{N_f} \sum_t n_t^{f} + \frac{\alpha}{N_r} \sum_t n_t^{r}

    Means run over the tokens that count; the mean over none is NaN, as in PyTorch.

    Args:
        forget: hidden states (*, d) and labels (*).
        retain: the same of the retain batch; its shape may differ.
        W: the head, (V, d).
        gamma: weight of the forget term.
        alpha: weight of the retain term.
        bias: (V,).
        ignore_index: the label of tokens that do not count.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        A scalar, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_nll` on one batch at a time.

    Sources: Liu et al. 2022 (arXiv 2203.12817); Maini et al. 2024 (TOFU, arXiv 2401.06121); the reduction is
    that of open-unlearning.
    """

    def mean(pair: tuple[Tensor, Tensor]) -> Tensor:
        h, labels = pair
        return linear_nll(
            h, W, labels, bias=bias, ignore_index=ignore_index, reduction="mean", backend=backend
        )

    return -gamma * mean(forget) + alpha * mean(retain)

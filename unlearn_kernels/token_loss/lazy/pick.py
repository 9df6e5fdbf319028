"""Single numbers of rows: a word's logit or likelihood, the log-sum-exp."""

import torch
from torch import Tensor

from unlearn_kernels.token_loss.lazy.rows import Rows
from unlearn_kernels.token_loss.linear import linear_nll

# No word has this number: every label counts.
NO_LABEL = -(1 << 62)


def in_vocabulary(rows: Rows, words: Tensor, least: int = 0) -> Tensor:
    """Words counted from 0, of indices from `least` on; a device asserts, as eager PyTorch does there.

    Raises:
        IndexError: if one is outside.
    """
    outside = (words < least) | (words >= rows.words)
    if words.device.type != "cpu":
        torch._assert_async(~outside.any())
    elif outside.any():
        raise IndexError(
            f"words of lazy logits must be in [{least}, {rows.words}), got {int(words[outside][0])}"
        )
    return torch.where(words < 0, words + rows.words, words) if least < 0 else words


def nll(rows: Rows, labels: Tensor, ignore_index: int = NO_LABEL, reduction: str = "none") -> Tensor:
    """Negative log-likelihoods under the softmax of these logits."""
    h, W, bias = rows.parts()
    options = {**rows.options(), "bias": bias}
    return linear_nll(h, W, labels, ignore_index=ignore_index, reduction=reduction, **options)  # type: ignore[arg-type]


def picked(rows: Rows, labels: Tensor) -> Tensor:
    """One word of every row, (*)."""
    if rows.kind == "logits":
        return logit(rows, labels).to(rows.dtype)
    likelihood = -nll(rows, labels)
    return likelihood if rows.kind == "log_probs" else likelihood.exp()


def logit(rows: Rows, labels: Tensor) -> Tensor:
    """The logit of one word of every row, in the accumulation type."""
    h, W, bias = rows.parts()
    wide = torch.promote_types(torch.promote_types(h.dtype, W.dtype), torch.float32)
    z = (h.to(wide) * W[labels].to(wide)).sum(-1)
    z = rows.scale * (z if bias is None else z + bias[labels].to(wide))
    return z if rows.softcap is None else rows.softcap * torch.tanh(z / rows.softcap)


def logsumexp(rows: Rows) -> Tensor:
    """The log-sum-exp of every row's logits, (*)."""
    first = torch.zeros(rows.h.shape[:-1], dtype=torch.long, device=rows.h.device)
    return nll(rows, first) + logit(rows, first)


def columns(rows: Rows, words: Tensor) -> Tensor:
    """Some words of every row, (*, K)."""
    words = in_vocabulary(rows, words, -rows.words)
    few = rows.but(W=rows.W[words], bias=None if rows.bias is None else rows.bias[words])
    if rows.kind == "logits":
        return few.dense()
    likelihoods = few.but(kind="logits").dense() - logsumexp(rows).unsqueeze(-1)
    return likelihoods if rows.kind == "log_probs" else likelihoods.exp()

"""Statistics of the rows of a language-model head in one sweep over the vocabulary."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.reference.token_rows import STAT_FIELDS, STATS, linear_rows
from unlearn_kernels.token_loss._autograd import one_by_one
from unlearn_kernels.token_loss._public import arguments, register_rows, run
from unlearn_kernels.token_loss._rows import FORWARD, LinearRows, RowArguments


class TokenStats(NamedTuple):
    """What `linear_stats` returns, one number a row, (*); 0 (False) where the label is ignored.

    Attributes:
        nll: negative log-likelihood of the label; 0 without labels.
        mean: mean of log p under p, the negative entropy.
        std: standard deviation of log p under p.
        hit: whether the label is the most likely word (the first of equals).
        margin: log p of the most likely word minus that of the next.
        argmax: the most likely word, the first of equals; any of them where a logit is NaN.
    """

    nll: Tensor
    mean: Tensor
    std: Tensor
    hit: Tensor
    margin: Tensor
    argmax: Tensor

    @property
    def entropy(self) -> Tensor:
        """Minus `mean`."""
        return -self.mean


class MaxMean(NamedTuple):
    """The largest logit of a row, and the mean of them all."""

    max: Tensor
    mean: Tensor


def _stats(rows: Any, *args: Any) -> tuple[Tensor, ...]:
    fields, argmax = rows(*args)
    row = dict(zip(STAT_FIELDS, fields, strict=True))
    return row["nll"], row["mean"], row["std"].detach(), row["margin"].detach(), argmax


def _max_mean(rows: Any, *args: Any) -> tuple[Tensor, Tensor]:
    fields, _ = rows(*args)
    return fields[STAT_FIELDS.index("peak")], fields[STAT_FIELDS.index("average")]


class _ClosedMaxMean(torch.autograd.Function):
    """Without a soft-cap both have closed gradients: a row of the head and its mean, not one V-sized number."""

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        fields, argmax = FORWARD(*args)
        return fields[STAT_FIELDS.index("peak")].clone(), fields[STAT_FIELDS.index("average")].clone(), argmax

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x = RowArguments(*inputs)
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(x.h, x.weight, x.bias, x.labels, output[2])
        ctx.ignore_index, ctx.scale = x.ignore_index, x.scale

    @staticmethod
    def backward(ctx: Any, d_max: Tensor, d_mean: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        h, weight, bias, labels, argmax = ctx.saved_tensors
        need_h, need_weight, need_bias = ctx.needs_input_grad[:3]
        kept = torch.ones_like(argmax, dtype=torch.bool) if labels is None else labels != ctx.ignore_index
        # Rows that do not count are never read.
        words, up, even = argmax[kept], d_max[kept] * ctx.scale, d_mean[kept] * ctx.scale / weight.shape[0]
        d_h = d_weight = d_bias = None
        if need_h:
            column_sums = weight.sum(0, dtype=up.dtype)
            rows = up.unsqueeze(-1) * weight[words] + even.unsqueeze(-1) * column_sums
            d_h = torch.zeros_like(h, memory_format=torch.contiguous_format)
            d_h[kept] = rows.to(h.dtype)
        if need_weight:
            x = h[kept].to(up.dtype)
            d_weight = (even @ x).expand(weight.shape).clone()
            d_weight = d_weight.index_add_(0, words, up.unsqueeze(-1) * x).to(weight.dtype)
        if need_bias:
            d_bias = even.sum().expand(weight.shape[0]).clone().index_add_(0, words, up).to(bias.dtype)
        return d_h, d_weight, d_bias, *[None] * (len(RowArguments._fields) - 3)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return one_by_one(_ClosedMaxMean.apply, info, in_dims, args), (0, 0, 0)


def _kernel_max_mean(*args: Any) -> tuple[Tensor, Tensor]:
    if RowArguments(*args).softcap == 0:
        found: tuple[Tensor, Tensor] = _ClosedMaxMean.apply(*args)[:2]
        return found
    return _max_mean(LinearRows.apply, *args)


register_rows(
    "linear_stats",
    "nll, mean and std of log p under p, hit, top-1 margin of a row",
    partial(_stats, LinearRows.apply),
    partial(_stats, linear_rows),
)
register_rows("linear_maxmean", "max_v z_v, mean_v z_v", _kernel_max_mean, partial(_max_mean, linear_rows))


def linear_stats(
    h: Tensor,
    W: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> TokenStats:
    r"""Statistics of a head's distribution over the vocabulary, row by row, in one sweep (2 N d V FLOPs).

    .. math:: n = -\log p_y, \quad \mu = \sum_v p_v \log p_v, \quad
        \sigma^2 = \sum_v p_v (\log p_v - \mu)^2, \quad p = \mathrm{softmax}(z)

    with z as in `linear_nll`. Moments are taken about the peak of the rest of the words, so that neither a
    confident nor a flat row cancels; Min-K++ is `(-n - \mu) / \sigma`. `nll` and `mean` are differentiable (once), the
    others are constants.

    Args:
        h: hidden states, (*, d); any strides; float32, float64, bfloat16 or float16.
        W: the head, (V, d); any strides.
        labels: (*), integers in [0, V) or `ignore_index`; without, every row counts and `nll` is 0.
        bias: (V,).
        ignore_index: the label of rows that do not count.
        scale: what multiplies the logits.
        softcap: Gemma-2's soft-cap, above 0.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        `TokenStats` of (*) tensors, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit, or a label is out of range.
        RuntimeError: if a gradient is differentiated again.

    Scratch: that of `linear_nll`'s forward, and N V / 24 numbers (7 for each tile of 192 words or so).

    Sources: Zhang et al. 2024 (Min-K%++, arXiv 2404.02936) for mean and standard deviation; Carlini et al. 2022
    (arXiv 2202.07646) for hits.
    """
    args = arguments(STATS, h, W, bias, None, labels, ignore_index, scale, softcap)
    nll, mean, std, margin, argmax = run("linear_stats", backend, args)
    hit = torch.zeros_like(argmax, dtype=torch.bool)
    if args.labels is not None:
        hit = (argmax == args.labels) & (args.labels != ignore_index)
    return TokenStats(nll, mean, std, hit, margin, argmax)


def linear_maxmean(
    h: Tensor,
    W: Tensor,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: Backend | None = None,
) -> MaxMean:
    r"""The largest and the mean logit of every row: what PDU pulls together.

    .. math:: \partial \max z / \partial z = e_{\arg\max z}, \qquad \partial \bar z / \partial z = 1 / V

    so that without a soft-cap gradients take O(N d + V d) operations instead of O(N d V).

    Args:
        h: hidden states, (*, d).
        W: the head, (V, d).
        labels: which rows count, (*): those whose label is not `ignore_index`; all without.
        bias: (V,).
        ignore_index: the label of rows that do not count; they get 0.
        scale: what multiplies the logits.
        softcap: Gemma-2's soft-cap, above 0; with it backward computes the logits again.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        `MaxMean` of (*) tensors, float32 (float64 for float64 inputs).

    Raises:
        ValueError: if shapes, devices or dtypes do not fit.

    Scratch: that of `linear_stats`.

    Source: open-unlearning's PDU (Entesari et al. 2025, arXiv 2506.05314).
    """
    args = arguments(STATS, h, W, bias, None, labels, ignore_index, scale, softcap)
    return MaxMean(*run("linear_maxmean", backend, args))

"""Statistics of every label of a data set, from one pass of a model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_kernels.token_loss._cache_files import Key
from unlearn_kernels.token_loss._models import evaluating
from unlearn_kernels.token_loss._options import counting
from unlearn_kernels.token_loss._samples import plain_keys
from unlearn_kernels.token_loss.hidden import MakeRows, hidden_rows
from unlearn_kernels.token_loss.statistics import TokenStats, linear_stats

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TokenTable:
    """What `token_stats` returns: numbers of N samples, and of their M tokens that count, sample after sample.

    Attributes:
        keys: of the samples, N.
        lengths: tokens of each sample that count, (N,).
        counts: labels of each sample before the shift, (N,): one more where its first position has one.
        labels: the tokens, (M,).
        nll: their negative log-likelihoods, (M,).
        mean: mean of log p under p, (M,).
        std: standard deviation of log p under p, (M,).
        hit: whether the token was the likeliest, (M,).
        margin: log p of the likeliest word minus that of the next, (M,).
    """

    keys: list[Key]
    lengths: Tensor
    counts: Tensor
    labels: Tensor
    nll: Tensor
    mean: Tensor
    std: Tensor
    hit: Tensor
    margin: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def starts(self) -> Tensor:
        """Where the tokens of each sample begin, (N,)."""
        return self.lengths.cumsum(0) - self.lengths

    @property
    def samples(self) -> Tensor:
        """The number of the sample that each token is of, (M,)."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    def tokens(self, sample: int) -> slice:
        """Where the tokens of a sample lie."""
        start = int(self.starts[sample])
        return slice(start, start + int(self.lengths[sample]))

    def sums(self, values: Tensor) -> Tensor:
        """Sums of (M,) over the tokens of each sample, (N,) float64."""
        return torch.zeros(len(self), dtype=torch.float64).index_add_(0, self.samples, values.double())

    def loss(self, *, fixed: bool = False) -> Tensor:
        """Mean negative log-likelihood of each sample, (N,) float64; NaN without tokens.

        open-unlearning divides by `counts`; `fixed` by the tokens that were summed.
        """
        return self.sums(self.nll) / (self.lengths if fixed else self.counts)


def token_stats(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    key: str = "index",
    rows: MakeRows = hidden_rows,
    progress: Progress | None = None,
) -> TokenTable:
    """Run a model over a data set once and keep seven numbers a token, which every audit here is made of.

    Where evaluations run once for each metric and keep T V log-probabilities, here is one forward pass without logits
    and one sweep of `linear_stats`. The model runs without gradients, in evaluation mode, and is left in the mode it
    was in.

    Args:
        model: what `rows` takes; by default a causal model with `get_output_embeddings`.
        batches: mappings as `hidden_rows` takes them.
        key: under which name a batch has its samples' keys; samples count from 0 where a batch has none.
        rows: what makes hidden states of a batch.
        progress: called with the number of samples done.

    Returns:
        A `TokenTable` on the CPU, in the order of the batches.

    Raises:
        ValueError: if two samples have one key, or as `rows` and `linear_stats`.

    Scratch: that of the model's body and of `linear_stats` on one batch.
    """
    keys: list[Key] = []
    parts: list[list[Tensor]] = []
    with evaluating(model):
        for batch in batches:
            made = rows(model, batch)
            labels, kept = made.labels, counting(made.labels, made.options)
            found = linear_stats(made.h, made.W, labels, **made.options)
            lengths = kept.sum(-1)
            counts = lengths if made.counts is None else made.counts
            picked = [x[kept] for x in (labels, *_kept(found))]
            parts.append([x.cpu() for x in (lengths, counts, *picked)])
            keys += _keys_of(batch, key, len(labels), len(keys))
            if progress is not None:
                progress(len(keys))
    if len(set(keys)) != len(keys):
        raise ValueError(f"batches: keys must differ, got {len(keys)} samples of {len(set(keys))} keys")
    if not parts:
        parts = [[torch.zeros(0, dtype=dtype) for dtype in _EMPTY]]
    return TokenTable(keys, *(torch.cat(column) for column in zip(*parts, strict=True)))


_EMPTY = (*[torch.int64] * 3, *[torch.float32] * 3, torch.bool, torch.float32)


def _kept(found: TokenStats) -> tuple[Tensor, ...]:
    return found.nll, found.mean, found.std, found.hit, found.margin


def _keys_of(batch: Any, name: str, size: int, done: int) -> list[Key]:
    if name not in batch:
        return list(range(done, done + size))
    return plain_keys(batch[name])

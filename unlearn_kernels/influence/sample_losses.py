"""Losses of single samples, which a collector takes gradients of."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def language_losses(
    model: nn.Module, batch: Mapping[str, Tensor], *, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    r"""The negative log-likelihood of each sequence, `\sum_t -\log p(y_{t+1} | y_{\le t})`, under a causal model.

    A model's own loss is a mean over all tokens of a batch: a sequence's share in it depends on the others'.

    Args:
        model: called with all of `batch` but its labels, returns `.logits` (B, T, V).
        batch: with `labels` (B, T), -100 where there is none.
        reduction: the sum over a sequence's tokens, or their mean.

    Returns:
        (B,), float32 (float64 for float64 logits).

    Raises:
        ValueError: if there are no labels.

    Memory: the logits.
    """
    if "labels" not in batch:
        raise ValueError(f"batch must have labels, got {', '.join(batch)}")
    labels = batch["labels"][:, 1:]
    logits = model(**{name: x for name, x in batch.items() if name != "labels"}).logits[:, :-1]
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    total = nll.view_as(labels).sum(1)
    return total if reduction == "sum" else total / (labels != -100).sum(1).clamp(min=1)


def class_losses(model: nn.Module, batch: Any) -> Tensor:
    """The cross-entropy of each sample under a classifier.

    Args:
        model: returns logits (B, C), or an object that has them as `.logits`.
        batch: (inputs, labels), or a mapping with `labels` whose rest the model is called with.

    Returns:
        (B,).

    Raises:
        ValueError: if there are no labels.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise ValueError(f"batch must have labels, got {', '.join(batch)}")
        labels = batch["labels"]
        found = model(**{name: x for name, x in batch.items() if name != "labels"})
    else:
        inputs, labels = batch
        found = model(inputs)
    logits = found if isinstance(found, Tensor) else found.logits
    return F.cross_entropy(logits, labels, reduction="none")


def noise_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    r"""The error of a denoiser at each sample, the mean of `(\epsilon_\theta(x_t, t) - \epsilon)^2`.

    The noise and the time are the batch's: drawn once a sample and kept, so that a run gives the same rows again.

    Args:
        model: called with `sample`, `timestep` and what else the batch has, returns `.sample` or a tensor.
        batch: `sample`, the noisy one, (B, ...), `timestep` (B,), `target` like the sample: the noise, or whatever the
            model learns to predict.

    Returns:
        (B,).

    Raises:
        ValueError: if one of the three is missing.
    """
    missing = [name for name in ("sample", "timestep", "target") if name not in batch]
    if missing:
        raise ValueError(f"batch must have {', '.join(missing)}, got {', '.join(batch)}")
    others = {name: x for name, x in batch.items() if name not in ("sample", "timestep", "target")}
    found = model(batch["sample"], batch["timestep"], **others)
    predicted = found if isinstance(found, Tensor) else found.sample
    return (predicted - batch["target"]).square().flatten(1).mean(1)

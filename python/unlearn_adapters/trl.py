"""TRL's trainers on these kernels: log-likelihoods of chosen and rejected answers without logits.

`install()` puts `linear_nll` and `linear_stats` under the head that TRL 1.16 fuses into its models' forward (DPO, KTO,
SFT, GRPO, RLOO), on the CPU too. Trainers of older versions compute from `model(...).logits`: give them
`unlearn_kernels.token_loss.lazy_logits(model)`, whose handle their code folds by itself. `sequence_log_probs` serves
trainers of your own.

Source: TRL, github.com/huggingface/trl; its `trainer/utils.py`, `add_fused_lm_head`.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_kernels.token_loss import lazy_logits, linear_nll, linear_stats

_before: dict[str, Any] = {}
_NAME = "_ChunkedLogProbFunction"
_COMPACT = "_use_triton"
_OPTIONAL = "entropy", "log_sum_sq_probs", "mean_logits", "is_top1"

Fields = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class LogProbs:
    """Stands where TRL has its autograd function."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        chunk_size: int,
        softcap: float | None,
        logit_scale: float,
        outputs: tuple[str, ...] = _OPTIONAL,
    ) -> Fields:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of rows (N, d); None for what is not asked.

        The first is always there. TRL applies the scale, then the soft-cap, then the temperature.
        """
        cap = None if softcap is None else softcap / temperature
        # No operator has these; and a head that ZeRO-3 gathers is gone when backward would compute logits again.
        if {"log_sum_sq_probs", "mean_logits"} & set(outputs) or hasattr(weight, "ds_id"):
            return _before[_NAME].apply(
                hidden, weight, bias, labels, temperature, chunk_size, softcap, logit_scale, outputs
            )
        options: dict[str, Any] = {"bias": bias, "scale": logit_scale / temperature, "softcap": cap}
        hidden = hidden if hidden.dtype == weight.dtype else hidden.to(weight.dtype)
        if not {"entropy", "is_top1"} & set(outputs):
            return -linear_nll(hidden, weight, labels, **options), None, None, None, None
        found = linear_stats(hidden, weight, labels, **options)
        entropy = found.entropy if "entropy" in outputs else None
        return -found.nll, entropy, None, None, found.hit if "is_top1" in outputs else None


def install() -> None:
    """Puts these kernels under TRL's fused head. A second call does nothing.

    Positions without a label are left out before the product on every device; TRL computes them where it has no Triton.

    Raises:
        ImportError: if this TRL has no fused head: use `lazy_logits` with it.
    """
    if _before:
        return
    utils = importlib.import_module("trl.trainer.utils")
    if not hasattr(utils, _NAME):
        raise ImportError("this version of TRL has no fused head: call lazy_logits(model) instead")
    for name, ours in ((_NAME, LogProbs), (_COMPACT, lambda device: True)):
        if hasattr(utils, name):
            _before[name] = getattr(utils, name)
            setattr(utils, name, ours)


def uninstall() -> None:
    """Puts TRL's own back."""
    for name in tuple(_before):
        setattr(importlib.import_module("trl.trainer.utils"), name, _before.pop(name))


def sequence_log_probs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Log-likelihoods of a batch of answers, (B,), without logits in memory.

    Args:
        model: that `lazy_logits` takes.
        inputs: of it, with `labels` (B, T), -100 where a token is no answer.
    """
    labels = inputs["labels"]
    with lazy_logits(model):
        logits = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    return -each.sum(1)


def dpo_loss(
    model: nn.Module,
    reference: nn.Module,
    chosen: dict[str, Tensor],
    rejected: dict[str, Tensor],
    beta: float = 0.1,
) -> Tensor:
    r"""`-mean log sigmoid(beta (chosen - rejected))` of log-likelihood ratios to a frozen reference.

    Args:
        model: that `lazy_logits` takes.
        reference: the same; a constant.
        chosen: inputs of the answers to be preferred, see `sequence_log_probs`.
        rejected: those of the others.
        beta: inverse temperature.
    """
    ratios = []
    for inputs in (chosen, rejected):
        with torch.no_grad():
            r = sequence_log_probs(reference, inputs)
        ratios.append(sequence_log_probs(model, inputs) - r)
    return -torch.nn.functional.logsigmoid(beta * (ratios[0] - ratios[1])).mean()

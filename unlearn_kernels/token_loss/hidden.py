"""What a model's head reads: hidden states, head and shifted labels of a batch, with no logits made."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from unlearn_kernels.token_loss._models import head_of
from unlearn_kernels.token_loss._options import LogitOptions, counting
from unlearn_kernels.token_loss.lazy import LazyLogits, lazy_logits

Batch = Mapping[str, Any]
# Entries of a batch that a model's forward gets no use of here.
_NOT_INPUTS: Final = ("labels", "index")


class HiddenRows(NamedTuple):
    """Rows of a head and the labels that they predict: what losses and audits take.

    Attributes:
        h: hidden states, (B, T, d), shifted: row t predicts label t.
        W: the head, (V, d).
        labels: (B, T), the ignored ones `ignore_index`.
        options: the head's bias, scale and soft-cap.
        counts: labels of each sequence before the shift, (B,), as open-unlearning counts them; None: as here.
    """

    h: Tensor
    W: Tensor
    labels: Tensor
    options: LogitOptions
    counts: Tensor | None = None


# Who makes the rows of a batch: `hidden_rows`, or a function of the caller's for models of other kinds.
MakeRows = Callable[[nn.Module, Any], HiddenRows]


def hidden_rows(model: nn.Module, batch: Batch, *, ignore_index: int = -100) -> HiddenRows:
    """Run a causal language model up to its head.

    The head is found by `get_output_embeddings` and lazy while the model runs (`lazy_logits`), so that B T V logits are
    never made, and what the model does to them after the head (Gemma's soft-cap, Cohere's and Granite's scales) is
    followed. Hooks of wrappers such as DDP and FSDP2 run.

    Args:
        model: a causal language model as `transformers` builds them, also under PEFT with a plain head.
        batch: the model's inputs. `labels` (B, T), unshifted, mark and name the tokens that count; without, every
            token that `attention_mask` keeps does. `index` is not passed on, and neither are labels: what a model would
            add to its own loss, such as a router's loss of a mixture of experts, is not in these rows.
        ignore_index: the label of tokens that do not count.

    Returns:
        `HiddenRows` of T - 1 rows a sequence, differentiable where the model is.

    Warns:
        RuntimeWarning: if the model made such a loss, with a gradient.

    Raises:
        ValueError: if the model has no head that is a linear layer, or changes logits in a way not known.
    """
    head = _head(model)
    device = head.weight.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = inputs.get("labels")
    if labels is None:
        mask = inputs.get("attention_mask")
        labels = inputs["input_ids"]
        labels = labels if mask is None else labels.long().masked_fill(mask == 0, ignore_index)
    with lazy_logits(model, head=head):
        output = model(**{k: v for k, v in inputs.items() if k not in _NOT_INPUTS})
    auxiliary = getattr(output, "aux_loss", None)
    if isinstance(auxiliary, Tensor) and auxiliary.requires_grad:
        warnings.warn(
            f"{type(model).__name__} makes an auxiliary loss of its router (output_router_logits), which no loss of "
            "hidden rows contains: add it yourself, or turn it off",
            RuntimeWarning,
            stacklevel=2,
        )
    h, W, options = _parts(model, _logits(output), head)
    options["ignore_index"] = ignore_index
    counts = counting(labels, options).sum(-1)
    return HiddenRows(h[..., :-1, :], W, labels[..., 1:], options, counts)


def _head(model: nn.Module) -> nn.Linear:
    """The linear layer that makes logits, without what PEFT has switched off."""
    head: Any = head_of(model)
    if head is None:
        raise ValueError(
            f"model: {type(model).__name__} has no get_output_embeddings(); pass rows=, a function that returns "
            "HiddenRows"
        )
    if getattr(head, "disable_adapters", None) is True:
        head = getattr(head, "original_module", None) or head.base_layer
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model: its head must be a plain linear layer, got {type(head).__name__}; merge adapters of the head, "
            "or pass rows="
        )
    return head


def _logits(output: Any) -> Tensor:
    found: Tensor | None = getattr(output, "logits", None)
    return output[0] if found is None else found


def _parts(model: nn.Module, logits: Tensor, head: nn.Linear) -> tuple[Tensor, Tensor, LogitOptions]:
    """Hidden states, head, and how the model makes logits of them."""
    rows = logits.rows if isinstance(logits, LazyLogits) else None
    if rows is not None and rows.kind == "logits" and rows.last and rows.marked is None:
        h, W, bias = rows.parts()
        return h, W, {"bias": bias, "scale": rows.scale, "softcap": rows.softcap}
    if logits.shape[-2] == 1:  # plain, and nothing follows that could be predicted
        return head.weight.new_zeros(*logits.shape[:-1], head.in_features), head.weight, {"bias": head.bias}
    raise ValueError(
        f"model: {type(model).__name__} changes logits after its head in a way that is not known, or is compiled as a "
        "whole; pass rows="
    )

"""What a model's head reads: hidden states, head and shifted labels of a batch, with no logits made."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from unlearn_kernels.token_loss._models import head_of, unwrapped
from unlearn_kernels.token_loss._options import LogitOptions

Batch = Mapping[str, Any]
# Entries of a batch that a model's forward gets no use of here.
_NOT_INPUTS: Final = ("labels", "index")
# A negative, a small and a large logit: scale and soft-cap show in what the model makes of them.
_PROBES: Final = (-20.0, 0.5, 40.0)


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

    The head is found by `get_output_embeddings` and left out while the model runs, so that B T V logits are never
    made. What the model does to logits after the head (Gemma's soft-cap, Cohere's and Granite's scales) is read from
    its configuration and checked on three numbers that stand in for logits.

    Args:
        model: a causal language model as `transformers` builds them, also under PEFT with a plain head.
        batch: the model's inputs. `labels` (B, T), unshifted, mark and name the tokens that count; without, every
            token that `attention_mask` keeps does. `index` is not passed on.
        ignore_index: the label of tokens that do not count.

    Returns:
        `HiddenRows` of T - 1 rows a sequence, differentiable where the model is.

    Raises:
        ValueError: if the model has no head that is a linear layer, or changes logits in a way not known.
    """
    outer, head = _head(model)
    device = head.weight.device
    inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = inputs.get("labels")
    if labels is None:
        mask = inputs.get("attention_mask")
        labels = inputs["input_ids"]
        labels = labels if mask is None else labels.masked_fill(mask == 0, ignore_index)
    options = _logit_options(model, head, ignore_index)
    with _stand_in(outer) as seen:
        output = model(**{k: v for k, v in inputs.items() if k not in _NOT_INPUTS})
    _check_logits(model, _logits(output), options, seen)
    (h,) = seen
    counts = (labels != ignore_index).sum(-1)
    return HiddenRows(h[..., :-1, :], head.weight, labels[..., 1:], options, counts)


def _head(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The module that the model calls, and the linear layer in it."""
    outer = head_of(model)
    if outer is None:
        raise ValueError(
            f"model: {type(model).__name__} has no get_output_embeddings(); pass rows=, a function that returns "
            "HiddenRows"
        )
    head: Any = outer
    if getattr(outer, "disable_adapters", None) is True:
        head = getattr(outer, "original_module", None) or outer.base_layer
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"model: its head must be a plain linear layer, got {type(head).__name__}; merge adapters of the head, "
            "or pass rows="
        )
    return outer, head


@contextmanager
def _stand_in(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the head is given; the model goes on with `_PROBES` for logits."""
    seen: list[Tensor] = []

    def forward(h: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(h)
        return h.new_tensor(_PROBES).repeat(*h.shape[:-1], 1)

    attributes = vars(head)
    own = attributes.get("forward")
    attributes["forward"] = forward
    try:
        yield seen
    finally:
        if own is None:
            del attributes["forward"]
        else:
            attributes["forward"] = own


def _logit_options(model: nn.Module, head: nn.Linear, ignore_index: int) -> LogitOptions:
    """Bias, scale and soft-cap, as the configuration names them."""
    config = getattr(unwrapped(model), "config", None)
    nested = getattr(config, "get_text_config", None)
    config = nested() if nested is not None else config
    scale = _number(config, "logit_scale", 1.0) / _number(config, "logits_scaling", 1.0)
    cap = _number(config, "final_logit_softcapping", 0.0)
    return {"bias": head.bias, "ignore_index": ignore_index, "scale": scale, "softcap": cap or None}


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return float(value) if isinstance(value, (int, float)) else default


def _logits(output: Any) -> Tensor:
    found = getattr(output, "logits", None)
    return output[0] if found is None else found


def _check_logits(model: nn.Module, logits: Tensor, options: LogitOptions, seen: list[Tensor]) -> None:
    """The probes must have become what the options make of them."""
    if len(seen) != 1:
        raise ValueError(
            f"model: {type(model).__name__} called its head {len(seen)} times, once expected; pass rows="
        )
    x = options["scale"] * torch.tensor(_PROBES, dtype=torch.float64)
    cap = options["softcap"]
    expected = x if cap is None else cap * torch.tanh(x / cap)
    found = logits.detach().reshape(-1, logits.shape[-1])[:1].double().cpu()
    close = found.shape[-1] == len(_PROBES) and torch.allclose(found, expected.expand_as(found), rtol=1e-2)
    if not close:
        raise ValueError(
            f"model: {type(model).__name__} changes logits after its head in a way that is not known; pass rows="
        )

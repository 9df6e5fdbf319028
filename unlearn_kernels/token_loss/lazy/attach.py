"""How a model comes to hand out lazy logits: the class of its head."""

import sys
from types import TracebackType
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from unlearn_kernels.token_loss._models import head_of, unwrapped
from unlearn_kernels.token_loss.lazy.gathered import whole
from unlearn_kernels.token_loss.lazy.handle import lazy
from unlearn_kernels.token_loss.lazy.rows import Rows


class LazyHead:
    """Comes before a Linear's class in the class of a head, whose forward it replaces."""

    lazy_strict: bool

    def forward(self, h: Tensor) -> Tensor:
        """Lazy logits; plain ones of a single position a sequence, while a graph is traced, and on other devices."""
        head: Any = self
        if torch.compiler.is_compiling() or _one_row(h) or h.device.type not in ("cpu", "cuda"):
            return super().forward(h)  # type: ignore[misc]
        _check_whole(head.weight)
        W, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        device = h.device.type
        if torch.is_autocast_enabled(device) and h.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            h, W, bias = h.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)
        if h.dtype != W.dtype:
            raise ValueError(f"hidden states must have the head's dtype, {W.dtype}, got {h.dtype}")
        return lazy(Rows(h, W, bias, h.dim() - 1, h.dtype, strict=head.lazy_strict))


class LazyLinear(LazyHead, nn.Linear):
    """A Linear whose output is lazy."""


_CLASSES: Final[dict[type, type]] = {nn.Linear: LazyLinear}


def _one_row(h: Tensor) -> bool:
    return h.dim() < 2 or (h.dim() > 2 and h.shape[-2] == 1)


def _check_whole(W: Tensor) -> None:
    tensor = sys.modules.get("torch.distributed.tensor")
    if tensor is not None and isinstance(W, tensor.DTensor):
        raise ValueError(
            "the head must be whole while the model runs, got a DTensor: leave it out of tensor parallel plans"
        )


class lazy_logits:  # noqa: N801 - a function to its users, like torch.no_grad
    """Makes `model(...).logits` a handle that loss code folds into operators without logits.

        lazy_logits(model)              # from now on
        with lazy_logits(model): ...    # or for a while

    In the first form `restore()` of what is returned undoes it. The handle, a `LazyLogits`, has the shape, dtype and
    device of the logits and is a tensor to `isinstance`. Slices and indices that keep the vocabulary whole, `view`,
    `reshape`, `flatten`, `transpose`, `permute`, casts, `detach`, `clone`, scaling, a soft-cap and (log-)softmax
    give handles again. `F.cross_entropy`, `F.nll_loss`, `F.kl_div`, soft targets, `gather`, indices of words,
    `logsumexp`, `argmax`, `max` and `mean` give numbers a row, by `linear_nll`, `linear_kl`, `linear_soft_ce`,
    `linear_stats` and `linear_maxmean`; values come in their type, float32 for half types. The loss that a model
    computes from labels does the same. Everything else makes the tensor, once a handle, as eager PyTorch would.

    Writing to a handle works as long as nothing else would share its memory; otherwise it raises, because what a
    view was written to could not be seen by what it is a view of. `register_hook` and autograd functions raise, but for
    those of FSDP2 and DeepSpeed.

    Logits are plain where they are small or no loss follows: one position a sequence, as in `generate()`, and
    while `torch.compile` traces the head (compile the body alone, `model.model.compile()`, and losses still fold).
    Under autocast the head runs in the lower type, as it does otherwise. Under DDP and FSDP2 hooks see the hidden
    states; under ZeRO-3 the handle holds a whole copy of the head until `backward()` (`autograd.grad` would leave the
    parameter gathered); a head that is sharded on its own or by tensor parallelism is refused.

    Args:
        model: with `get_output_embeddings()`, such as those of transformers, or wrapped (`module`). A soft-cap and a
            scale that its forward applies to the logits are followed.
        head: the head itself, for models without that method: an `nn.Linear`.
        strict: raise RuntimeError, with what was asked and what to do, wherever the tensor would be made.

    Raises:
        ValueError: if the head is no `nn.Linear`, or something has replaced its forward already.
    """

    def __init__(self, model: nn.Module, *, head: nn.Module | None = None, strict: bool = False) -> None:
        self.head = cast("Any", _head(model) if head is None else head)
        self.before: tuple[type, bool] | None = type(self.head), getattr(self.head, "lazy_strict", False)
        self.head.__class__ = _lazy_class(self.head)
        self.head.lazy_strict = strict

    def restore(self) -> None:
        """Makes the model what it was."""
        if self.before is not None:
            kind, strict = self.before
            self.head.__class__ = kind
            del self.head.lazy_strict
            if issubclass(kind, LazyHead):
                vars(self.head)["lazy_strict"] = strict
            self.before = None

    def __enter__(self) -> "lazy_logits":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def _head(model: nn.Module) -> nn.Module:
    head = head_of(model)
    if head is None:
        name = type(unwrapped(model)).__name__
        raise ValueError(f"model must have get_output_embeddings() with a head, or give its head, got {name}")
    return head


def _lazy_class(head: nn.Module) -> type:
    kind = type(head)
    if isinstance(head, LazyHead):
        return kind
    if kind.forward is not nn.Linear.forward:
        raise ValueError(
            f"the head must be an nn.Linear, got {kind.__name__}; leave it out of adapters and quantisation"
        )
    if "forward" in vars(head):
        raise ValueError(
            "the head's forward must be its class's, got one of its own: call lazy_logits before"
        )
    if any(base.__name__ == "FSDPModule" for base in kind.__mro__):
        raise ValueError("the head must not be sharded on its own, got one that fully_shard was called on")
    if kind not in _CLASSES:
        _CLASSES[kind] = type(f"Lazy{kind.__name__}", (LazyHead, kind), {"__module__": kind.__module__})
    return _CLASSES[kind]

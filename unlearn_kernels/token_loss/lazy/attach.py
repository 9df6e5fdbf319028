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


class _Use:
    """A time during which a head is lazy, for its copies too."""

    def __init__(self, strict: bool) -> None:
        self.strict, self.over = strict, False

    def __deepcopy__(self, memo: Any) -> "_Use":
        return self


class LazyHead:
    """Comes before a Linear's class in the class of a head, whose forward it replaces."""

    lazy_uses: list[_Use]

    def forward(self, h: Tensor) -> Tensor:
        """Lazy logits; plain ones where nobody asks for lazy ones any more, and wherever `_plain` says."""
        head: Any = self
        use = next((x for x in reversed(head.lazy_uses) if not x.over), None)
        if use is None or _plain(h):
            return super().forward(h)  # type: ignore[misc]
        _check_whole(head.weight)
        W, bias = whole(head.weight), None if head.bias is None else whole(head.bias)
        device = h.device.type
        if torch.is_autocast_enabled(device) and h.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
            h, W, bias = h.to(dtype), W.to(dtype), None if bias is None else bias.to(dtype)
        if h.dtype != W.dtype:
            raise ValueError(f"hidden states must have the head's dtype, {W.dtype}, got {h.dtype}")
        return lazy(Rows(h, W, bias, h.dim() - 1, h.dtype, strict=use.strict))


class LazyLinear(LazyHead, nn.Linear):
    """A Linear whose output is lazy."""


_CLASSES: Final[dict[type, type]] = {nn.Linear: LazyLinear}


def _plain(h: Tensor) -> bool:
    """A single position a sequence, a graph that is traced, a transform of torch.func, another device."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    one_row = h.dim() < 2 or (h.dim() > 2 and h.shape[-2] == 1)
    return traced or one_row or h.device.type not in ("cpu", "cuda")


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

    In the first form `restore()` of what is returned undoes it; copies of the model are lazy for as long. The handle, a
    `LazyLogits`, has the shape, dtype and device of the logits and is a tensor to `isinstance`. Slices and indices that
    keep the vocabulary whole, `view`, `reshape`, `flatten`, `transpose`, `permute`, casts, `detach`, `clone`, scaling,
    a soft-cap and (log-)softmax give handles again. `F.cross_entropy`, `F.nll_loss`, `F.kl_div`, soft targets,
    `gather`, indices of words, `logsumexp`, `argmax`, `max` and `mean` give numbers a row, by `linear_nll`,
    `linear_kl`, `linear_soft_ce`, `linear_stats` and `linear_maxmean`; values come in their type, float32 for half
    types. The loss that a model computes from labels does the same. Everything else makes the tensor, once a handle, as
    eager PyTorch would.

    A handle is made of hidden states and weights when it is used: after one of them, or the labels of a loss that
    waits, was written to in place (an optimiser's step), it raises RuntimeError and names it, unless its tensor was
    made before. Writing to a handle, or to a plain view of what it made, works as long as no other handle and no
    single position or word that was read shares the memory; otherwise it or the next use raises. What bypasses
    PyTorch's version counters is not seen: writes through `.data` or NumPy, and to hidden states under inference mode.

    `register_hook`, `requires_grad_` and `torch.autograd.grad` for a handle raise, and so do autograd functions and
    with them backward hooks of modules, but for those of FSDP2 and DeepSpeed: a handle never has a gradient of its own,
    `.dense()` has.

    Logits are plain where they are small or no loss follows: one position a sequence, as in `generate()`, while
    `torch.compile` traces the head (compile the body alone, `model.model.compile()`, and losses still fold), and in
    transforms of `torch.func`, which a handle from outside cannot enter. Under autocast the head runs in the lower
    type, as it does otherwise. Under DDP and FSDP2 hooks see the hidden states; under ZeRO-3 the handle holds a whole
    copy of the head until `backward()` (`autograd.grad` would leave the parameter gathered); a head that is sharded on
    its own or by tensor parallelism is refused.

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
        self.use = _Use(strict)
        self.head.__class__ = _lazy_class(self.head)
        self.head.lazy_uses = [*getattr(self.head, "lazy_uses", ()), self.use]

    def restore(self) -> None:
        """Ends it, for copies of the model too; whatever else made the head lazy goes on."""
        self.use.over = True
        uses = [use for use in getattr(self.head, "lazy_uses", ()) if not use.over]
        plain = next((kind for kind, lazy in _CLASSES.items() if lazy is type(self.head)), None)
        if plain is None or uses:
            return
        self.head.__class__ = plain
        del self.head.lazy_uses

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

"""What a lazy tensor stands for: hidden states, a head, and what was made of their logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels.token_loss.lazy.changes import version

Kind = Literal["logits", "log_probs", "probs", "one_hot"]


@dataclass(frozen=True, eq=False)
class Rows:
    """Logits of a head, or what a peer's code made of them, none of it in memory.

    Attributes:
        h: hidden states, (*, d); the dimensions * are those of the lazy tensor without its vocabulary.
        W: the head, (V, d).
        bias: (V,).
        scale: what multiplies the logits.
        softcap: Gemma-2's.
        kind: logits, their log-softmax, their softmax; or a sparse tensor of their shape.
        at: which dimension of the lazy tensor is the vocabulary.
        dtype: what eager PyTorch's tensor would have.
        marked: words (*) whose logits are lowered by `by`; those where a `one_hot` is `by` instead of 0.
        by: infinite where the word is taken out.
        strict: whether to raise rather than to make the tensor.
        versions: how often its tensors had been written to when this was made.
    """

    h: Tensor
    W: Tensor
    bias: Tensor | None
    at: int
    dtype: torch.dtype
    scale: float = 1.0
    softcap: float | None = None
    kind: Kind = "logits"
    marked: Tensor | None = None
    by: float = 0.0
    strict: bool = False
    versions: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "versions", self._versions())

    def _versions(self) -> tuple[int, int, int, int]:
        return version(self.h), version(self.W), version(self.bias), version(self.marked)

    def changed(self) -> str | None:
        """What of it has been written to since."""
        now = self._versions()
        if now == self.versions:
            return None
        names = ("the hidden states", "the head's weight", "the head's bias", "the words lowered")
        return next(name for name, a, b in zip(names, now, self.versions, strict=True) if a != b)

    def unchanged(self) -> "Rows":
        """Itself.

        Raises:
            RuntimeError: if anything of it has been written to since: the logits would be others.
        """
        changed = self.changed()
        if changed is not None:
            raise RuntimeError(
                f"lazy logits are made when they are used, and {changed} changed in place since the model ran: "
                "use them before, or keep .dense()"
            )
        return self

    @property
    def words(self) -> int:
        """V."""
        return self.W.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the lazy tensor."""
        lead = self.h.shape[:-1]
        return *lead[: self.at], self.words, *lead[self.at :]

    @property
    def last(self) -> bool:
        """Whether the vocabulary is the last dimension."""
        return self.at == self.h.dim() - 1

    def but(self, **changes: Any) -> "Rows":
        """The same with changes."""
        return replace(self, **changes)

    def moved(self, change: Callable[[Tensor], Tensor], at: int | None = None) -> "Rows":
        """After a change of the dimensions *, given as a function of tensors (*, any), which it leaves last."""
        marked = None if self.marked is None else change(self.marked.unsqueeze(-1)).squeeze(-1)
        h = change(self.h)
        return replace(self, h=h, marked=marked, at=h.dim() - 1 if at is None else at)

    def constant(self) -> "Rows":
        """The same without history."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, h=self.h.detach(), W=self.W.detach(), bias=bias)

    def options(self) -> dict[str, Any]:
        """How the operators make these logits."""
        return {"bias": self.bias, "scale": self.scale, "softcap": self.softcap}

    def parts(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states, head and bias in one type, float64 if that was asked for."""
        self.check_head()
        if self.dtype == torch.float64 or torch.float64 in (self.h.dtype, self.W.dtype):
            bias = None if self.bias is None else self.bias.double()
            return self.h.double(), self.W.double(), bias
        return self.h, self.W, self.bias

    def dense(self) -> Tensor:
        """The tensor itself."""
        if self.kind == "one_hot":
            made = torch.zeros((*self.h.shape[:-1], self.words), dtype=self.dtype, device=self.h.device)
            if self.marked is not None:
                made.scatter_(-1, self.marked.unsqueeze(-1), self.by)
            return made.movedim(-1, self.at)
        self.check_head()
        common = torch.promote_types(self.h.dtype, self.W.dtype)
        bias = None if self.bias is None else self.bias.to(common)
        with torch.autocast(self.h.device.type, enabled=False):
            z = F.linear(self.h.to(common), self.W.to(common), bias)
        z = z.to(self.dtype)
        z = z if self.scale == 1 else self.scale * z
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        if self.marked is not None:
            lowered = z.gather(-1, self.marked.unsqueeze(-1)) - self.by
            z = z.scatter(-1, self.marked.unsqueeze(-1), lowered)
        if self.kind != "logits":
            z = z.log_softmax(-1) if self.kind == "log_probs" else z.softmax(-1)
        return z.movedim(-1, self.at)

    def check_head(self) -> None:
        """Sharding that frees a head after its forward leaves nothing to read."""
        if self.W.numel() and self.W.untyped_storage().nbytes() == 0:
            raise RuntimeError(
                "the head's weight was freed after its forward: give fully_shard(..., reshard_after_forward=False) "
                "for what holds the head"
            )

    def same_logits(self, other: "Rows") -> bool:
        """Whether both stand for the same numbers, marked words aside."""
        return (
            self.scale == other.scale
            and self.softcap == other.softcap
            and _same(self.h, other.h)
            and _same(self.W, other.W)
            and _same(self.bias, other.bias)
        )

    def scaled_as(self, other: "Rows") -> "Rows | None":
        """The same logits under the scale and soft-cap of another; None if there is no way."""
        if self.softcap != other.softcap:
            return None
        ratio = self.scale / other.scale if other.scale else math.nan
        if ratio == 1:
            return self
        if not math.isfinite(ratio):
            return None
        bias = None if self.bias is None else ratio * self.bias
        return replace(self, h=ratio * self.h, bias=bias, scale=other.scale)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    layout = a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
    return layout and a.device == b.device and a.data_ptr() == b.data_ptr()

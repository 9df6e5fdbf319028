"""A training step's loss on `model(...).logits`, as training code has it, with and without `lazy_logits`."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.cases import token_loss as losses
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register

_BETA = 0.1


class _Model(nn.Module):
    """The end of a language model: hidden states to an output with logits."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(W)

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(self, h: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(h))


def _sequence_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """TOFU's way: classes to the second dimension, a loss a token, a sum a sequence."""
    return functional.cross_entropy(logits.transpose(-1, -2), labels, reduction="none").sum(-1)


def _loss(model: nn.Module, h: Tensor, labels: Tensor, reference_nll: Tensor) -> Tensor:
    n = _sequence_loss(model(h).logits, labels)
    return -functional.logsigmoid(_BETA * (n - reference_nll)).mean() * 2 / _BETA


def _step(inputs: losses.Head, lazy: bool, compile_it: bool = False) -> Call:
    from unlearn_kernels.token_loss import lazy_logits

    h, model = inputs.h.detach().requires_grad_(), _Model(inputs.W)
    loss = compiled(_loss) if compile_it else _loss
    if lazy:
        lazy_logits(model, strict=True)

    def run() -> losses.Gradients:
        value = loss(model, h, inputs.labels, inputs.reference_nll)
        return losses.Gradients(value.detach(), *torch.autograd.grad(value, (h, model.head.weight)))

    return Call(run)


_PROVIDERS = (
    Provider("unlearn_kernels, lazy_logits", lambda x: _step(x, True), "ours"),
    Provider("torch eager", lambda x: _step(x, False), "plain"),
    Provider("torch.compile", lambda x: _step(x, False, True), compiled=True),
)


def _case(label: str, B: int, T: int, d: int, V: int, warm: Case | None) -> Case:
    return register(
        Case(
            f"token_loss.lazy_npo/{label}/float32",
            ops=("linear_nll",),
            shape=f"B {B}, T {T}, d {d}, V {V}, forward+backward",
            dtype=torch.float32,
            flops=6 * B * T * V * d,
            bytes=4 * (3 * V * d + 2 * B * T * d),
            make=losses.make(B, T, d, V, torch.float32),
            reference=losses.npo64,
            error=losses.error,
            providers=_PROVIDERS,
            bound=1e-6,
            peer_bound=5e-2,
            relative_to="torch eager",
            memory_unit=4 * B * T * V,
            warm=warm,
        )
    )


_case(*losses.LARGE[0], _case("small", 2, 64, 128, 4000, None))

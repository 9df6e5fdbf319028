"""The unlearning losses against literal transcriptions of their formulas and against liger-kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.token_loss import grad_ascent, grad_diff, npo, simnpo, wga

MakeHead = Callable[..., Any]
Loss = Callable[..., Tensor]
Pair = tuple[Tensor, Tensor]


def _sequence_nll(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    logits = h @ W.T if bias is None else h @ W.T + bias
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100)
    return tokens.view(labels.shape).sum(1)


def _npo_literally(
    h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None, reference: Tensor, beta: float
) -> Tensor:
    """-(2 / beta) E log sigmoid(-beta log(pi / pi_ref)), with log pi = -nll."""
    log_ratio = -_sequence_nll(h, W, labels, bias) + reference
    return -(2 / beta) * torch.log(torch.sigmoid(-beta * log_ratio)).mean()


def _grad_diff_literally(
    forget: Pair, retain: Pair, W: Tensor, bias: Tensor | None, gamma: float, alpha: float
) -> Tensor:
    means = [F.cross_entropy((h @ W.T + bias).flatten(0, 1), y.flatten()) for h, y in (forget, retain)]
    return -gamma * means[0] + alpha * means[1]


def _compare(names: tuple[str, ...], actual: list[Tensor], exact: list[Tensor], eager: list[Tensor]) -> None:
    for name, *tensors in zip(names, actual, exact, eager, strict=True):
        assert_as_exact_as(name, *tensors, factor=4)


def _with_gradients(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("beta", [0.1, 2.5])
@pytest.mark.parametrize("bias", [False, True])
def test_npo(head: MakeHead, beta: float, bias: bool) -> None:
    x = head((5, 9), 12, 43, bias=bias)
    reference = 30 + randn(5, seed=7)

    def ours(h: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return npo(h, W, x.labels, reference, beta=beta, bias=b)

    def literal(h: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return _npo_literally(h, W, x.labels, b, reference.to(h.dtype), beta)

    names = ("npo", "h", "W", "bias")[: 3 + bias]
    _compare(
        names,
        _with_gradients(ours, x.leaves()),
        _with_gradients(literal, x.double().leaves()),
        _with_gradients(literal, x.leaves()),
    )


def test_npo_far_from_the_reference(head: MakeHead) -> None:
    # Literally, log sigmoid(-1e4) is -inf in float32; its value is -1e4 and its slope 1.
    x = head((2, 9), 12, 43, bias=False)
    W = x.W.requires_grad_()
    value = npo(x.h, W, x.labels, torch.tensor([1e5, -1e5]), beta=0.1)
    (gradient,) = torch.autograd.grad(value, W)
    exact = W.detach().double().requires_grad_()
    n = _sequence_nll(x.h.double(), exact, x.labels, None)
    expected = -20 * (0.1 * (n[0] - 1e5)) / 2
    torch.testing.assert_close(value.double(), expected)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(expected, exact)[0], rtol=1e-5, atol=1e-6
    )


def test_npo_counts_sequences_without_labels(head: MakeHead) -> None:
    x = head((3, 4), 5, 7)
    x.labels[1] = -100
    alone = [npo(x.h[i : i + 1], x.W, x.labels[i : i + 1], torch.zeros(1)) for i in range(3)]
    torch.testing.assert_close(npo(x.h, x.W, x.labels, torch.zeros(3)), torch.stack(alone).mean())


def test_npo_of_empty_sequences(head: MakeHead) -> None:
    x = head((3, 0), 5, 7, bias=False)
    W = x.W.requires_grad_()
    value = npo(x.h, W, x.labels, torch.zeros(3))
    torch.testing.assert_close(value, 20 * torch.log(torch.tensor(2.0)))
    assert not torch.autograd.grad(value, W)[0].any()


def test_grad_diff(head: MakeHead) -> None:
    x, other = head((3, 7), 12, 43), head((2, 11), 12, 43)
    weights = {"gamma": 0.7, "alpha": 1.3}

    def leaves(dtype: torch.dtype) -> list[Tensor]:
        parts = (x.h, other.h * 0.5, x.W, x.bias)
        return [part.detach().to(dtype).requires_grad_() for part in parts]

    def ours(h: Tensor, g: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return grad_diff((h, x.labels), (g, other.labels), W, bias=b, **weights)

    def literal(h: Tensor, g: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return _grad_diff_literally((h, x.labels), (g, other.labels), W, b, **weights)

    _compare(
        ("grad_diff", "forget h", "retain h", "W", "bias"),
        _with_gradients(ours, leaves(torch.float32)),
        _with_gradients(literal, leaves(torch.float64)),
        _with_gradients(literal, leaves(torch.float32)),
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda h, W, y: grad_diff((h[:1], y[:1]), (h[1:2], y[1:2]), W),
        lambda h, W, y: grad_ascent(h, W, y, dialect="llm_unlearn"),
        lambda h, W, y: simnpo(h, W, y),
        lambda h, W, y: wga(h[1:2], W, y[1:2]),
    ],
)
def test_a_frozen_head_and_a_sequence_without_labels(head: MakeHead, loss: Loss) -> None:
    x = head((3, 7), 12, 43)
    x.labels[1] = -100
    h = x.h.requires_grad_()
    value = loss(h, x.W, x.labels)
    assert value.isnan()
    (gradient,) = torch.autograd.grad(value, h)
    assert not gradient[1].any()


def test_losses_compile(head: MakeHead) -> None:
    x = head((3, 7), 12, 43, bias=False)
    W = x.W.requires_grad_()

    def loss(h: Tensor, W: Tensor) -> Tensor:
        return npo(h, W, x.labels, torch.ones(3)) + grad_diff((h, x.labels), (2 * h, x.labels), W)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.h, W), loss(x.h, W))
    torch.testing.assert_close(torch.autograd.grad(compiled(x.h, W), W), torch.autograd.grad(loss(x.h, W), W))


def test_misuse_names_the_argument(head: MakeHead) -> None:
    x = head((3, 7), 12, 43)
    with pytest.raises(ValueError, match="beta must be positive, got 0"):
        npo(x.h, x.W, x.labels, torch.zeros(3), beta=0)
    with pytest.raises(ValueError, match=r"reference_nll .*\(3,\), got \(7,\)"):
        npo(x.h, x.W, x.labels, torch.zeros(7))
    with pytest.raises(ValueError, match="labels"):
        grad_diff((x.h, x.labels), (x.h, x.labels[:2]), x.W)


def _liger_npo(h: Tensor, W: Tensor, labels: Tensor, references: Tensor, beta: float) -> Tensor:
    """NPO as a subclass of liger-kernel's chunked base, a sequence a chunk."""
    name = "liger_kernel.chunked_loss.fused_linear_unpaired_preference"
    base = pytest.importorskip(name).LigerFusedLinearUnpairedPreferenceBase

    class ChunkedNpo(base):
        @staticmethod
        def preference_loss_fn(
            log_prob: Tensor, preference_labels: Tensor, full_target: Tensor, *, references: Tensor
        ) -> Tensor:
            margin = -log_prob - next(references)
            return -(2 / beta) * F.logsigmoid(beta * margin).sum() / len(full_target)

        @classmethod
        def forward(cls, ctx: Any, h: Tensor, W: Tensor, references: Tensor) -> Any:
            forget = torch.zeros(len(h), dtype=torch.bool)
            return base.forward(cls, ctx, h, W, labels, forget, compiled=False, references=references)

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
            return (*base.backward(ctx, upstream)[:2], None)

    return ChunkedNpo.apply(h, W, iter(references))[0]


def test_npo_agrees_with_liger(head: MakeHead) -> None:
    x = head((4, 9), 12, 43, bias=False)
    references = 30 + randn(4, seed=7)
    ours = _with_gradients(lambda h, W: npo(h, W, x.labels, references, beta=0.3), x.leaves())
    theirs = _with_gradients(lambda h, W: _liger_npo(h, W, x.labels, references, 0.3), x.leaves())
    for actual, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(actual, expected)

"""Lazy logits that are written to, whose model changed since the forward, or that go through autograd functions."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.token_loss.handles import FULL, LABELS, B, T, V, head, hidden, made
from unlearn_kernels.token_loss import LazyLogits, lazy_logits


def test_writing_to_what_nothing_shares():
    expected = head()(hidden()).clone()
    expected[0, 0] = 1.0
    z = made().clone()
    z[0, 0] = 1.0
    torch.testing.assert_close(z.dense(), expected)
    torch.testing.assert_close(z[..., :2].sum(), expected[..., :2].sum())
    torch.testing.assert_close(F.cross_entropy(z.mT, LABELS), F.cross_entropy(expected.mT, LABELS))
    assert z.div_(2) is z
    torch.testing.assert_close(z.logsumexp(-1), (expected / 2).logsumexp(-1))


def test_writing_to_what_others_share_is_refused():
    z = made()
    part = z[..., :-1, :]
    for target in (z, part, z.detach()):
        with pytest.raises(
            RuntimeError, match="mul_: lazy logits that others share cannot be written to; clone"
        ):
            target.mul_(2)
    with pytest.raises(RuntimeError, match="lazy logits cannot be an output"):
        torch.add(torch.zeros(B, T, V), 1, out=made())


WRITERS = {
    "some_words": lambda z: z[..., 3:].fill_(-1e9),
    "flat": lambda z: z.view(-1)[:5].zero_(),
    "tensor_of_words": lambda z: z[..., torch.tensor([1, 2])].fill_(9.0),  # a copy in eager PyTorch too
    "mask": lambda z: z[LABELS == 1].fill_(9.0),
}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("name", WRITERS)
def test_writing_to_plain_views(name, mode):
    with mode():
        expected, z = head()(hidden()).clone(), made()
        for x in (expected, z):
            WRITERS[name](x)
        torch.testing.assert_close(z.logsumexp(-1), expected.logsumexp(-1))
        torch.testing.assert_close(F.cross_entropy(z.mT, LABELS), F.cross_entropy(expected.mT, LABELS))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize(
    "write",
    [
        lambda z: z[..., 5].fill_(100.0),
        lambda z: z.log_softmax(-1)[..., 5].fill_(1.0) + z[0, 1, 2].fill_(1.0),
        lambda z: z[:, -1].fill_(3.0),
        lambda z: z[:, -1, :].__setitem__((slice(None), 3), 5.0),
        lambda z: z[:, 1:].detach()[..., 3:].fill_(1.0),
    ],
)
def test_writing_to_what_handles_cannot_see_raises(write, mode):
    with mode():
        z = made(strict=False)
        write(z)
        for use in (Tensor.sum, lambda x: x[:, 1:].logsumexp(-1), LazyLogits.dense):
            with pytest.raises(RuntimeError, match="do not see what was written to a view"):
                use(z)


def test_reading_positions_keeps_nothing_of_them():
    with torch.no_grad():
        z = made()
        for _ in range(100):
            z[:, -1].sum()
        assert len(z.lent.written()) == 0
        assert len(z.lent._seen) < 40
        kept = z[:, 0]
        for _ in range(100):
            z[:, -1].sum()
        kept.zero_()
        with pytest.raises(RuntimeError, match="written to a view"):
            z.logsumexp(-1)
    with pytest.raises(RuntimeError, match="others share cannot be written"):
        z.mul_(2)


def test_writes_without_gradients_keep_the_history():
    h = hidden()
    both = head()(h), made(h=h)
    for x in both:
        with torch.no_grad():
            x[..., 3] = -1e9
    expected, found = (torch.autograd.grad(F.cross_entropy(x.mT, LABELS), h) for x in both)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda h, linear, labels: h.detach().mul_(3), "the hidden states"),
        (lambda h, linear, labels: torch.optim.SGD([linear.weight], 0.1).step(), "the head's weight"),
        (lambda h, linear, labels: linear.bias.add_(1), "the head's bias"),
        (lambda h, linear, labels: labels.fill_(1), "the labels"),
    ],
)
def test_what_changed_since_is_named(change, what):
    h, linear, labels = hidden(), head(), LABELS.clone()
    linear.weight.grad = torch.ones_like(linear.weight)
    lazy_logits(nn.Sequential(), head=linear)
    z, kept = linear(h), linear(h)
    exact = kept.dense().logsumexp(-1).detach()
    loss, total = F.cross_entropy(z.mT, labels), z[:, 1:]
    lowered = z.detach().scatter(-1, (words := FULL.clone()).unsqueeze(-1), -torch.inf)
    with torch.no_grad():
        change(h, linear, labels)
        words.fill_(2)
    uses = (
        [loss.item, loss.backward] if what == "the labels" else [loss.item, z.sum, total.dense, lambda: z[0]]
    )
    for use in uses:
        with pytest.raises(RuntimeError, match=f"{what} changed in place since"):
            use()
    if what == "the labels":
        with pytest.raises(RuntimeError, match="the words lowered changed in place"):
            lowered.softmax(-1)
    torch.testing.assert_close(kept.logsumexp(-1), exact)  # it had been made


class _Pre(torch.autograd.Function):
    """What ZeRO-3 puts on the output of every module."""

    ran: ClassVar[list[int]] = []

    @staticmethod
    def forward(outputs):
        return outputs.detach()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.module = len(_Pre.ran)

    @staticmethod
    def backward(ctx, *grads):
        _Pre.ran.append(ctx.module)
        return grads


def _gradients(loss, *changes):
    linear, h = head(), hidden()
    lazy_logits(nn.Sequential(), head=linear, strict=True)
    z, parts = linear(h), (h, linear.weight, linear.bias)
    for change in changes:
        z = change(z)
    return torch.autograd.grad(loss(z), parts)


def test_deepspeeds_functions_and_hooks_reach_every_part(monkeypatch):
    def halve(grad):
        return grad / 2

    def loss(z):
        return F.cross_entropy(z[:, 1:].mT, LABELS[:, 1:], reduction="none").square().sum()

    def hooked(z):
        z.register_hook(halve).remove()
        z.register_hook(halve)
        return z

    expected = _gradients(loss)
    with pytest.raises(RuntimeError, match=r"_Pre.apply: lazy logits cannot go through an autograd function"):
        _gradients(loss, _Pre.apply)
    monkeypatch.setattr(_Pre, "__module__", "deepspeed.runtime.zero.parameter_offload")
    monkeypatch.setattr(halve, "__module__", "deepspeed.runtime.utils", raising=False)
    torch.testing.assert_close(_gradients(loss, _Pre.apply, _Pre.apply), expected)
    assert len(_Pre.ran) == 2
    halves = tuple(x / 2 for x in expected)
    torch.testing.assert_close(_gradients(loss, hooked), halves)
    torch.testing.assert_close(_gradients(loss, _Pre.apply, hooked), halves)


FORWARDS = [lambda x: x, Tensor.clone, lambda x: x.view_as(x), lambda x: 1 * x]


@pytest.mark.parametrize("forward", FORWARDS)
def test_autograd_functions_are_named(forward):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return forward(x)

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    z = Doubled.apply(made())
    for use in (Tensor.sum, lambda z: F.cross_entropy(z[0], FULL[0]), LazyLogits.dense):
        with pytest.raises(RuntimeError, match=r"Doubled.apply: lazy logits cannot go through"):
            use(z)
    h = hidden()
    loss = Doubled.apply(F.cross_entropy(made(h=h).mT, LABELS))
    (found,) = torch.autograd.grad(loss, h)
    (expected,) = torch.autograd.grad(2 * F.cross_entropy(head()(h).mT, LABELS), h)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_of_the_head_are_named(register):
    linear = head()
    getattr(linear, register)(lambda *a: None)
    lazy_logits(nn.Sequential(), head=linear)
    with pytest.raises(RuntimeError, match=r"BackwardHookFunction.apply: lazy logits cannot go through"):
        F.cross_entropy(linear(hidden()).mT, LABELS)


def test_a_head_under_checkpointing():
    linear, h = head(), hidden()
    lazy_logits(nn.Sequential(), head=linear)
    with pytest.raises(RuntimeError, match=r"CheckpointFunction.apply: lazy logits cannot go through"):
        F.cross_entropy(checkpoint(linear, h, use_reentrant=True).mT, LABELS)
    F.cross_entropy(checkpoint(linear, h, use_reentrant=False).mT, LABELS).backward()
    (expected,) = torch.autograd.grad(F.cross_entropy(head()(h).mT, LABELS), h)
    torch.testing.assert_close(h.grad, expected)

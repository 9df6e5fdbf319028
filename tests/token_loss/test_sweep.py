"""Reductions and frozen heads: gradients made along with the loss."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from tests.token_loss.extended import nll_and_gradients
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn
from unlearn_kernels.token_loss import _sweep, linear_nll, npo, simnpo

MakeHead = Callable[..., Any]
Head = Any  # conftest.Head

REDUCTIONS = pytest.mark.parametrize("reduction", ["sum", "mean"])


def eager(x: Head, leaves: list[Tensor], reduction: str) -> Tensor:
    bias = leaves[2] if len(leaves) > 2 else None
    logits = functional.linear(leaves[0], leaves[1], bias).flatten(0, -2)
    return functional.cross_entropy(logits, x.labels.flatten(), reduction=reduction)


def ours(x: Head, leaves: list[Tensor], reduction: str) -> Tensor:
    bias = leaves[2] if len(leaves) > 2 else None
    return linear_nll(*leaves[:2], x.labels, bias=bias, reduction=reduction)


def gradients(loss: Callable[..., Tensor], x: Head, reduction: str, factor: float = 1.0) -> list[Tensor]:
    leaves = x.leaves()
    value = loss(x, leaves, reduction)
    return [value.detach(), *torch.autograd.grad(value * factor, leaves)]


@REDUCTIONS
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "d", "V"), [((1,), 1, 1), ((2, 3), 5, 7), ((131,), 33, 97), ((3, 130), 70, 601)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_gradients(
    head: MakeHead, rows: tuple[int, ...], d: int, V: int, bias: bool, reduction: str, dtype: torch.dtype
) -> None:
    x = head(rows, d, V, dtype, bias=bias, ignored=0.3 if rows != (1,) else 0.0)
    found, plain = (gradients(loss, x, reduction) for loss in (ours, eager))
    exact = nll_and_gradients(x, reduction=reduction)
    for name, *tensors in zip(("loss", "h", "W", "bias"), found, exact, plain, strict=False):
        assert_as_exact_as(name, *tensors, floor=4 * torch.finfo(tensors[0].dtype).eps)


def test_many_chunks_of_rows(head: MakeHead) -> None:
    x = head((700,), 24, 50_001)  # six chunks, none of them whole strips
    found, plain = (gradients(loss, x, "sum") for loss in (ours, eager))
    exact = gradients(eager, x.double(), "sum")
    for name, *tensors in zip(("loss", "h", "W", "bias"), found, exact, plain, strict=True):
        assert_as_exact_as(name, *tensors)


@REDUCTIONS
def test_agrees_with_the_recomputing_path(head: MakeHead, reduction: str) -> None:
    x = head((4, 50), 31, 211, torch.float64)
    leaves = x.leaves()
    nll = linear_nll(*leaves[:2], x.labels, bias=leaves[2])
    count = 1 if reduction == "sum" else (x.labels != -100).sum()
    expected = torch.autograd.grad(nll.sum() / count, leaves)
    torch.testing.assert_close(gradients(ours, x, reduction)[1:], list(expected))


@pytest.mark.parametrize("factor", [1.0, -3.0, 0.0])
@REDUCTIONS
def test_any_factor(head: MakeHead, reduction: str, factor: float) -> None:
    x = head((9,), 5, 17, torch.float64)
    torch.testing.assert_close(
        gradients(ours, x, reduction, factor), gradients(eager, x.double(), reduction, factor)
    )


def test_backward_twice(head: MakeHead) -> None:
    x = head((9,), 5, 17, torch.float64)
    leaves = x.leaves()
    value = 2 * ours(x, leaves, "mean")
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    first = [g.clone() for g in first]
    torch.testing.assert_close(first, list(torch.autograd.grad(value, leaves)))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_head(head: MakeHead, reduction: str, dtype: torch.dtype) -> None:
    x = head((3, 70), 19, 301, dtype)

    def d_h(y: Head, loss: Callable[..., Tensor]) -> Tensor:
        h = y.h.detach().requires_grad_()
        value = loss(y, [h, y.W, y.bias], reduction)
        upstream = torch.ones(()) if value.dim() == 0 else randn(3, 70, seed=5)
        return torch.autograd.grad(value, h, upstream.reshape(value.shape).to(value.dtype))[0]

    assert_as_exact_as("d_h", d_h(x, ours), d_h(x.double(), eager), d_h(x, eager))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_rows_get_no_gradient_of_a_frozen_head(head: MakeHead, value: float) -> None:
    x = head((3, 7), 5, 17)
    h, upstream = x.h.requires_grad_(), randn(3, 7, seed=5).masked_fill(x.labels == -100, value)
    assert (x.labels == -100).any()
    found, plain = (
        torch.autograd.grad(linear_nll(h, x.W, x.labels, backend=backend), h, upstream)[0]
        for backend in (None, "reference")
    )
    torch.testing.assert_close(found, plain)
    assert not found[x.labels == -100].any()


def test_a_mean_of_nothing_gives_a_frozen_head_no_gradient(head: MakeHead) -> None:
    x = head((2, 5), 4, 6, ignored=1.1)
    h = x.h.requires_grad_()
    loss = linear_nll(h, x.W, x.labels, reduction="mean")
    assert loss.isnan()
    assert not torch.autograd.grad(loss, h)[0].any()


@REDUCTIONS
def test_nothing_counts(head: MakeHead, reduction: str) -> None:
    x = head((5,), 4, 6, ignored=1.1)
    value, *found = gradients(ours, x, reduction)
    assert torch.equal(value, torch.tensor(0.0 if reduction == "sum" else torch.nan)) or value.isnan()
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found)


@REDUCTIONS
def test_infinite_logits_give_nan_where_the_reference_does(head: MakeHead, reduction: str) -> None:
    x = head((6,), 4, 8, bias=False, ignored=0.0)
    x.h[2, 1] = torch.inf

    def reference(y: Head, leaves: list[Tensor], how: str) -> Tensor:
        return linear_nll(*leaves, y.labels, reduction=how, backend="reference")

    for found, plain in zip(gradients(ours, x, reduction), gradients(reference, x, reduction), strict=True):
        assert torch.equal(found.isnan(), plain.isnan())


def test_threads_do_not_change_a_bit(head: MakeHead) -> None:
    x = head((401,), 65, 3001)
    one, *others = at_threads((1, 2, 4), lambda: gradients(ours, x, "mean"))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("argnums", [0, 1])
def test_func_grad_and_vmap(head: MakeHead, argnums: int) -> None:
    x = head((3, 4), 5, 7, torch.float64)

    def loss(h: Tensor, W: Tensor, labels: Tensor, backend: str | None = None) -> Tensor:
        return linear_nll(h, W, labels, reduction="sum", backend=backend)

    torch.testing.assert_close(
        grad(loss, argnums)(x.h, x.W, x.labels), grad(loss, argnums)(x.h, x.W, x.labels, "reference")
    )
    rows = vmap(grad(loss, argnums), in_dims=(0, None, 0))(x.h, x.W, x.labels)
    for index, row in enumerate(rows):
        expected = grad(loss, argnums)(x.h[index], x.W, x.labels[index], "reference")
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(head: MakeHead, frozen: bool) -> None:
    x = head((6, 4), 5, 7)
    compiled = torch.compile(
        lambda h, W: linear_nll(h, W, x.labels, reduction="mean"), fullgraph=True, backend="aot_eager"
    )
    found, expected = [], []
    for call, into in (
        (compiled, found),
        (lambda h, W: linear_nll(h, W, x.labels, reduction="mean"), expected),
    ):
        h, W = x.h.detach().requires_grad_(), x.W.detach().requires_grad_(not frozen)
        value = call(h, W)
        into += [value.detach(), *torch.autograd.grad(value, [h] if frozen else [h, W])]
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_refused(head: MakeHead) -> None:
    x = head((4,), 3, 5, torch.float64)
    leaves = x.leaves()
    (first,) = torch.autograd.grad(ours(x, leaves, "sum"), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_nll.*gradients of gradients"):
        first.sum().backward()


def test_unknown_reduction(head: MakeHead) -> None:
    x = head((4,), 3, 5)
    with pytest.raises(ValueError, match="reduction must be none, sum or mean, got 'avg'"):
        linear_nll(x.h, x.W, x.labels, reduction="avg")


PREFERENCES: dict[str, Callable[..., Tensor]] = {
    "npo": lambda h, W, y, **o: npo(h, W, y, 9 * torch.arange(len(y)), beta=0.03, **o),
    "erasus": lambda h, W, y, **o: npo(h, W, y, torch.zeros(len(y)), beta=0.03, dialect="erasus", **o),
    "simnpo": lambda h, W, y, **o: simnpo(h, W, y, delta=9.0, beta=0.3, **o),
    "lengths": lambda h, W, y, **o: simnpo(h, W, y, lengths=y.shape[1] * torch.ones(len(y)), **o),
}


@pytest.mark.parametrize("name", PREFERENCES)
@pytest.mark.parametrize("shape", [((5, 60), 6, 40_001), ((2, 150), 3, 30_011), ((3, 4, 2), 5, 7)], ids=str)
def test_losses_of_sequences(
    head: MakeHead, name: str, shape: tuple[tuple[int, ...], int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, loss = head(*shape, torch.float64), PREFERENCES[name]
    leaves = x.leaves()

    def found(**options: Any) -> list[Tensor]:
        value = loss(*leaves[:2], x.labels, bias=leaves[2], softcap=20.0, **options)
        return [value.detach(), *torch.autograd.grad(-3 * value, leaves)]

    torch.testing.assert_close(found(), found(backend="reference"), rtol=1e-9, atol=1e-12)
    one, *others = at_threads((1, 2, 4), found)
    assert all(torch.equal(a, b) for other in others for a, b in zip(one, other, strict=True))
    monkeypatch.setattr(_sweep, "sequence_preference", None)
    torch.testing.assert_close(found(memory_budget=0), one)
    with pytest.raises(TypeError):
        found()


def test_losses_of_sequences_that_are_not_swept(head: MakeHead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sweep, "sequence_preference", None)
    x, r = head((3, 5), 4, 11, bias=False), torch.zeros(3)
    h, W = x.leaves()
    npo(h, W.detach(), x.labels, r)
    npo(h.detach(), W, x.labels, r)
    npo(h[:1], W, x.labels[:1], r[:1])
    npo(h, W, x.labels, r.clone().requires_grad_())
    npo(h, W.bfloat16(), x.labels, r)
    npo(h, W, x.labels, r, memory_budget=4 * 5 * 11 - 1)
    with torch.no_grad():
        npo(h, W, x.labels, r)


def test_a_sequence_without_labels_is_none_of_simnpos(head: MakeHead) -> None:
    x = head((3, 5), 4, 11, bias=False, ignored=0.0)
    x.labels[1] = -100
    leaves = x.leaves()
    swept, recomputed = (simnpo(*leaves, x.labels, memory_budget=budget) for budget in (None, 0))
    assert swept.isnan()
    assert recomputed.isnan()
    for ours, other in zip(*(torch.autograd.grad(v, leaves) for v in (swept, recomputed)), strict=True):
        torch.testing.assert_close(ours, other, equal_nan=True)

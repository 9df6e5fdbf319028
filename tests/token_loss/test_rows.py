"""Statistics and distances of rows against the float64 reference: values, gradients, reductions, frozen heads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap

from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn
from unlearn_kernels.token_loss import (
    linear_kl,
    linear_maxmean,
    linear_soft_ce,
    linear_softplus,
    linear_stats,
)

MakeHead = Callable[..., Any]
Head = Any  # conftest.Head
Loss = Callable[..., Any]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [((1,), 1, 3), ((7,), 5, 11), ((2, 3), 1, 3), ((13,), 300, 17), ((2, 211), 33, 1009)]


REFERENCES: dict[Any, tuple[Tensor, ...]] = {}


def reference_of(x: Head, d: int = 9) -> tuple[Tensor, ...]:
    """A reference model of another width: numbers that every dtype holds, made once (no draws inside a trace)."""
    rows, V = x.h.shape[:-1], len(x.W)
    if (rows, V, x.h.dtype) not in REFERENCES:
        parts = randn(*rows, d, seed=11), randn(V, d, seed=12) * d**-0.5, randn(V, seed=13)
        exact = tuple(part.clamp(-4, 4).bfloat16().to(torch.float16) for part in parts)
        REFERENCES[rows, V, x.h.dtype] = tuple(part.to(x.h.dtype) for part in exact)
    return REFERENCES[rows, V, x.h.dtype]


def stats(x: Head, h: Tensor, W: Tensor, bias: Tensor | None, **options: Any) -> list[Tensor]:
    found = linear_stats(h, W, x.labels, bias=bias, **options)
    return [found.nll, found.mean, found.std, found.margin]


def max_mean(x: Head, h: Tensor, W: Tensor, bias: Tensor | None, **options: Any) -> list[Tensor]:
    return list(linear_maxmean(h, W, x.labels, bias=bias, **options))


def of_reference(function: Loss, labelled: bool = True, **fixed: Any) -> Loss:
    def call(x: Head, h: Tensor, W: Tensor, bias: Tensor | None, **options: Any) -> list[Tensor]:
        reference = reference_of(x)
        return [function(h, W, x.labels, reference, bias=bias, **fixed, **options)]

    return call


def kl(h: Tensor, W: Tensor, labels: Tensor, reference: Any, **options: Any) -> Tensor:
    return linear_kl(h, W, reference, labels, **options)


def softplus(h: Tensor, W: Tensor, labels: Tensor, reference: Any, **options: Any) -> Tensor:
    return linear_softplus(h, W, reference, labels, **options)


def ceu(x: Head, h: Tensor, W: Tensor, bias: Tensor | None, **options: Any) -> list[Tensor]:
    return [linear_soft_ce(h, W, x.labels, bias=bias, **options)]


def offset(x: Head, h: Tensor, W: Tensor, bias: Tensor | None, **options: Any) -> list[Tensor]:
    return [linear_softplus(h, W, None, x.labels, beta=0.7, offset=-0.4, bias=bias, **options)]


LOSSES = {
    "kl": of_reference(kl),
    "reverse kl": of_reference(kl, direction="reverse"),
    "cross": of_reference(kl, direction="cross"),
    "undial": of_reference(linear_soft_ce, beta=10.0),
    "soft": of_reference(linear_soft_ce),
    "ceu": ceu,
    "softplus": of_reference(softplus, beta=0.1),
    "offset": offset,
}
ALL = {"stats": stats, "maxmean": max_mean, **LOSSES}
EACH = pytest.mark.parametrize("name", ALL)
EACH_LOSS = pytest.mark.parametrize("name", LOSSES)


def gradients(
    x: Head, call: Loss, trained: tuple[bool, bool, bool] = (True,) * 3, **options: Any
) -> list[Tensor]:
    parts = [x.h, x.W, x.bias]
    leaves = [
        None if p is None else p.detach().requires_grad_(on) for p, on in zip(parts, trained, strict=True)
    ]
    found = call(x, *leaves, **options)
    smooth = [f for f in found if f.requires_grad]
    upstream = [randn(*f.shape, seed=4 + i).to(f.dtype) for i, f in enumerate(smooth)]
    wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [f.detach() for f in found] + list(torch.autograd.grad(smooth, wanted, upstream))


def check(x: Head, call: Loss, **options: Any) -> None:
    actual = gradients(x, call, backend="cpp", **options)
    eager = gradients(x, call, backend="reference", **options)
    exact = gradients(x.double(), call, backend="reference", **options)
    for index, tensors in enumerate(zip(actual, exact, eager, strict=True)):
        assert tensors[0].dtype == tensors[2].dtype
        # The float64 oracle is no more exact than float64 kernels.
        floor = 1e-13 if tensors[0].dtype == torch.float64 else None
        assert_as_exact_as(f"result {index}", *tensors, floor=floor)


@EACH
@pytest.mark.parametrize(("rows", "d", "V"), SHAPES)
def test_shapes(head: MakeHead, rows: tuple[int, ...], d: int, V: int, name: str) -> None:
    check(head(rows, d, V, bias=len(rows) == 1), ALL[name])


@EACH
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(head: MakeHead, dtype: torch.dtype, name: str) -> None:
    check(head((3, 19), 37, 701, dtype), ALL[name])


@EACH
def test_scale_and_softcap(head: MakeHead, name: str) -> None:
    x = head((3, 19), 37, 701)
    check(x, ALL[name], scale=1.5)
    check(x, ALL[name], scale=2.0, softcap=5.0)


@EACH_LOSS
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("trained", [(True, True, True), (True, False, False), (False, True, True)])
def test_reductions(head: MakeHead, name: str, reduction: str, trained: tuple[bool, ...]) -> None:
    x = head((5, 40), 24, 301)
    actual, eager = (
        gradients(x, LOSSES[name], trained, reduction=reduction, backend=b) for b in ("cpp", "reference")
    )
    exact = gradients(x.double(), LOSSES[name], trained, reduction=reduction, backend="reference")
    for index, tensors in enumerate(zip(actual, exact, eager, strict=True)):
        assert_as_exact_as(f"result {index}", *tensors)


@EACH_LOSS
def test_frozen_head_with_any_upstream_gradient(head: MakeHead, name: str) -> None:
    x = head((5, 40), 24, 301)
    frozen = gradients(x, LOSSES[name], (True, False, False))
    torch.testing.assert_close(frozen, gradients(x, LOSSES[name])[:2])


@EACH_LOSS
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_ignored_rows_get_no_gradient_of_a_frozen_head(head: MakeHead, name: str, value: float) -> None:
    x = head((3, 7), 5, 17)
    h, ignored = x.h.requires_grad_(), x.labels == -100
    upstream = randn(3, 7, seed=5).masked_fill(ignored, value)
    (found,) = torch.autograd.grad(LOSSES[name](x, h, x.W, x.bias), h, upstream)
    (clean,) = torch.autograd.grad(LOSSES[name](x, h, x.W, x.bias), h, upstream.masked_fill(ignored, 0.0))
    assert torch.equal(found, clean)
    assert not found[ignored].any()


@EACH_LOSS
def test_a_mean_of_nothing_gives_a_frozen_head_no_gradient(head: MakeHead, name: str) -> None:
    x = head((2, 5), 4, 6, ignored=1.1)
    h = x.h.requires_grad_()
    (loss,) = LOSSES[name](x, h, x.W, x.bias, reduction="mean")
    assert loss.isnan()
    assert not torch.autograd.grad(loss, h)[0].any()


def test_many_chunks_of_rows(head: MakeHead) -> None:
    check(head((300,), 8, 20_001), LOSSES["kl"], reduction="sum")
    check(head((500,), 8, 20_001), LOSSES["ceu"], reduction="mean")


@EACH
def test_without_labels_every_row_counts(head: MakeHead, name: str) -> None:
    if name in ("undial", "soft", "ceu"):
        pytest.skip("needs labels")
    x = head((2, 9), 12, 51)
    check(x._replace(labels=None), ALL[name])


@EACH
def test_ignored_rows_are_never_read(head: MakeHead, name: str) -> None:
    x = head((2, 9), 12, 51)
    poisoned = x._replace(h=x.h.masked_fill((x.labels == -100).unsqueeze(-1), float("nan")))
    for ours, clean in zip(gradients(poisoned, ALL[name]), gradients(x, ALL[name]), strict=True):
        torch.testing.assert_close(ours, clean, rtol=0, atol=0)


@EACH
@pytest.mark.parametrize("rows", [(0,), (2, 0), ()])
def test_empty_and_scalar_batches(head: MakeHead, name: str, rows: tuple[int, ...]) -> None:
    check(head(rows, 5, 7, ignored=0.0), ALL[name])


@EACH
@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_minus_infinity_and_nan_pass_through(head: MakeHead, name: str, value: float) -> None:
    x = head((30,), 8, 300)
    bias = x.bias.clone()
    bias[250] = value
    x = x._replace(bias=bias, labels=x.labels.masked_fill(x.labels == 250, 1))
    if name in ("maxmean", "kl", "undial", "soft") and value < 0:
        pytest.skip("infinite by its formula")
    if name == "maxmean":
        pytest.skip("its gradient does not depend on values of logits")
    actual, expected = (gradients(x, ALL[name], backend=b) for b in ("cpp", "reference"))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=1e-4, atol=1e-5)


@EACH
def test_large_logits(head: MakeHead, name: str) -> None:
    x = head((30,), 8, 300)
    check(x._replace(W=x.W * 100), ALL[name])


@EACH
def test_gradcheck(head: MakeHead, name: str) -> None:
    x = head((2, 3), 3, 5, torch.float64)

    def smooth(h: Tensor, W: Tensor, b: Tensor) -> list[Tensor]:
        return [f for f in ALL[name](x, h, W, b, softcap=6.0) if f.requires_grad]

    if name != "ceu":  # whose target counts as a constant
        assert torch.autograd.gradcheck(smooth, x.leaves())


@EACH_LOSS
def test_func_transforms(head: MakeHead, name: str) -> None:
    x = head((3, 4), 5, 7, torch.float64)

    def total(h: Tensor, W: Tensor, backend: str | None = None) -> Tensor:
        return LOSSES[name](x, h, W, x.bias, reduction="mean", backend=backend)[0]

    for argnums in (0, 1):
        expected = grad(total, argnums)(x.h, x.W, "reference")
        torch.testing.assert_close(grad(total, argnums)(x.h, x.W), expected)
    heads = torch.stack([x.W, 2 * x.W])
    batched = vmap(grad(total, 1), in_dims=(None, 0))(x.h, heads)
    torch.testing.assert_close(batched, torch.stack([grad(total, 1)(x.h, W) for W in heads]))


@EACH
def test_compile(head: MakeHead, name: str) -> None:
    x = head((6, 4), 5, 7)
    torch._dynamo.reset()
    compiled = torch.compile(ALL[name], fullgraph=True, backend="aot_eager")
    expected = gradients(x, ALL[name])
    torch.testing.assert_close(gradients(x, compiled), expected)


@EACH
def test_threads_do_not_change_a_bit(head: MakeHead, name: str) -> None:
    x = head((401,), 33, 1501)
    one, *others = at_threads((1, 2, 4), lambda: gradients(x, ALL[name]))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_hits_argmax_and_entropy(head: MakeHead) -> None:
    x = head((50,), 12, 301)
    z = x.h @ x.W.T + x.bias
    x.labels[:9] = z.argmax(-1)[:9]
    found = linear_stats(x.h, x.W, x.labels, bias=x.bias)
    kept = x.labels != -100
    assert torch.equal(found.argmax[kept], z.argmax(-1)[kept])
    assert torch.equal(found.hit, (z.argmax(-1) == x.labels) & kept)
    assert found.hit[:9].all()
    expected = torch.distributions.Categorical(logits=z).entropy().masked_fill(~kept, 0)
    torch.testing.assert_close(found.entropy, expected)


@pytest.mark.parametrize("label", [0, 3, 250])
def test_equal_logits_give_the_first_word(label: int) -> None:
    h, W = torch.ones(1, 2), torch.zeros(300, 2)
    W[[3, 250]] = 1.0
    found = linear_stats(h, W, torch.tensor([label]))
    assert (found.argmax.item(), found.hit.item(), found.margin.item()) == (3, label == 3, 0.0)


@pytest.mark.parametrize("gap", [1.0, 10.0, 16.0, 30.0])
def test_confident_rows_do_not_cancel(gap: float) -> None:
    # The label's probability is 1 - 300 e^-gap or so: what fp32 cannot hold beside 1 is what these losses are about.
    h, W = torch.ones(1, 1), torch.linspace(-1, 0, 301).unsqueeze(1)
    W[7] = gap
    y = torch.tensor([7])
    reference, exact_reference = (h, W), (h.double(), W.double())
    for loss in (
        lambda h, W, r: linear_soft_ce(h, W, y),
        lambda h, W, r: linear_soft_ce(h, W / 2, y, r, beta=10.0),
        lambda h, W, r: linear_stats(h, W, y).nll,
        lambda h, W, r: linear_stats(h, W, y).std,
    ):
        exact = loss(h.double(), W.double(), exact_reference)
        torch.testing.assert_close(loss(h, W, reference).double(), exact, rtol=2e-6, atol=0)


def test_flat_rows_have_no_deviation() -> None:
    found = linear_stats(torch.ones(3, 4), torch.zeros(50_000, 4), torch.arange(3))
    assert (found.std < 1e-6).all()
    torch.testing.assert_close(found.entropy, torch.full((3,), 50_000.0).log())


def test_a_distance_to_itself_is_zero(head: MakeHead) -> None:
    x = head((40,), 12, 5000, bias=False)
    for direction in ("forward", "reverse"):
        assert linear_kl(x.h, x.W, (x.h, x.W), direction=direction).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["stats", "maxmean"])
def test_one_word_alone(head: MakeHead, name: str) -> None:
    x = head((5,), 4, 1, ignored=0.0)
    found, plain = (gradients(x, ALL[name], backend=backend) for backend in ("cpp", "reference"))
    torch.testing.assert_close(found, plain)
    assert all(g.isfinite().all() for g in plain[-3:])


def test_second_derivatives_are_refused(head: MakeHead) -> None:
    x = head((4,), 3, 5, torch.float64)
    h = x.h.requires_grad_()
    (first,) = torch.autograd.grad(linear_stats(h, x.W, x.labels).nll.sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ((torch.ones(9, 5),), r"reference must be \(h, W\)"),
        ((torch.ones(8, 5), torch.ones(7, 5)), r"reference: hidden states must have rows \(9,\)"),
        ((torch.ones(9, 5), torch.ones(6, 5)), "reference: its vocabulary must be 7"),
        ((torch.ones(9, 5), torch.ones(7, 4)), "h of the reference must have shape"),
        ((torch.ones(9, 5).double(), torch.ones(7, 5).double()), "both be float64 or neither"),
    ],
)
def test_misuse_of_the_reference(head: MakeHead, reference: Any, message: str) -> None:
    x = head((9,), 5, 7)
    with pytest.raises(ValueError, match=message):
        linear_kl(x.h, x.W, reference)


def test_other_misuse(head: MakeHead) -> None:
    x = head((9,), 5, 7)
    with pytest.raises(ValueError, match="softcap must be positive and finite, got 0"):
        linear_stats(x.h, x.W, x.labels, softcap=0)
    with pytest.raises(ValueError, match="direction must be forward, reverse or cross, got 'both'"):
        linear_kl(x.h, x.W, (x.h, x.W), direction="both")
    with pytest.raises(ValueError, match="beta needs a reference"):
        linear_soft_ce(x.h, x.W, x.labels, beta=1.0)
    with pytest.raises(ValueError, match="labels are needed"):
        linear_soft_ce(x.h, x.W, None, (x.h, x.W), beta=1.0)
    with pytest.raises(ValueError, match="reduction must be none, sum or mean, got 'avg'"):
        linear_softplus(x.h, x.W, reduction="avg")
    x.labels[2] = 7
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\) or -100, got 7"):
        linear_stats(x.h, x.W, x.labels)

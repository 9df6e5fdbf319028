"""Logit scale, soft-cap and the memory budget of `linear_nll`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.token_loss.extended import nll_and_gradients
from unlearn_kernels.testing import assert_as_exact_as, at_threads, randn
from unlearn_kernels.token_loss import linear_nll

MakeHead = Callable[..., Any]
Head = Any  # conftest.Head


def gradients(x: Head, upstream: Tensor | None = None, **options: Any) -> list[Tensor]:
    leaves = x.leaves()
    nll = linear_nll(*leaves[:2], x.labels, bias=leaves[2] if len(leaves) > 2 else None, **options)
    upstream = torch.ones(()) if upstream is None else upstream
    return [nll.detach(), *torch.autograd.grad(nll, leaves, upstream.to(nll.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(0.0625, None), (1.0, 30.0), (-3.0, 2.0)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_scale_and_softcap(
    head: MakeHead, dtype: torch.dtype, bias: bool, scale: float, softcap: float | None, reduction: str
) -> None:
    x = head((3, 19), 37, 701, dtype, bias=bias)
    options = {"scale": scale, "softcap": softcap, "reduction": reduction}
    upstream = randn(3, 19, seed=4) if reduction == "none" else None
    actual, eager = (gradients(x, upstream, backend=b, **options) for b in ("cpp", "reference"))
    exact = nll_and_gradients(x, upstream, **options)
    for name, *tensors in zip(("nll", "h", "W", "bias"), actual, exact, eager, strict=False):
        assert_as_exact_as(name, *tensors)


@pytest.mark.parametrize("z", [1e-30, 1e-4, 0.3, 0.6249, 0.6251, 3.0, 20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softcap_is_exact_at_every_size(z: float, dtype: torch.dtype) -> None:
    # With the second logit at 0 the peak is the capped first.
    from unlearn_kernels.token_loss import linear_maxmean

    h, W = torch.ones(1, 1, dtype=dtype), torch.tensor([[z], [0.0]], dtype=dtype)
    expected = torch.tanh(W[0].double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(linear_maxmean(h, W, softcap=1.0).max.double(), expected, rtol=2 * eps, atol=0)


@pytest.mark.parametrize("budget", [0, 1, 40_000, 300_000, 1 << 30, None])
def test_any_memory_budget_gives_the_same_numbers(head: MakeHead, budget: int | None) -> None:
    x, upstream = head((3, 70), 24, 1500), randn(3, 70, seed=5)
    expected = gradients(x, upstream, memory_budget=0)
    torch.testing.assert_close(gradients(x, upstream, memory_budget=budget), expected)


def test_kept_logits_with_a_softcap_serve_backward_twice(head: MakeHead) -> None:
    x, upstream = head((3, 70), 24, 1500), randn(3, 70, seed=5)
    leaves = x.leaves()
    nll = linear_nll(*leaves[:2], x.labels, bias=leaves[2], softcap=3.0, memory_budget=1 << 30)
    first = torch.autograd.grad(nll, leaves, upstream, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(nll, leaves, upstream), first, rtol=0, atol=0)
    torch.testing.assert_close(list(first), gradients(x, upstream, softcap=3.0, memory_budget=0)[1:])


def test_threads_do_not_change_a_bit_of_kept_logits(head: MakeHead) -> None:
    x, upstream = head((401,), 65, 3001), randn(401, seed=5)
    one, *others = at_threads((1, 2, 4), lambda: gradients(x, upstream, memory_budget=2 << 20))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_misuse(head: MakeHead) -> None:
    x = head((9,), 5, 7)
    with pytest.raises(ValueError, match="memory_budget must not be negative, got -1"):
        linear_nll(x.h, x.W, x.labels, memory_budget=-1)
    for softcap in (-2.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"softcap must be positive and finite, got {softcap}"):
            linear_nll(x.h, x.W, x.labels, softcap=softcap)

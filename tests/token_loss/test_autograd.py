"""Autograd, torch.func, torch.compile and operator registration."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.library import opcheck

from unlearn_kernels._backends import Backend
from unlearn_kernels.token_loss import linear_nll

MakeHead = Callable[..., Any]
Head = Any  # conftest.Head

FORWARD = torch.ops.unlearn_kernels.linear_nll_forward.default
BACKWARD = torch.ops.unlearn_kernels.linear_nll_backward.default

# ignore_index, scale and soft-cap
SETTINGS = (-100, 1.5, 4.0)


@pytest.fixture
def x(head: MakeHead) -> Head:
    return head((3, 4), 5, 7, torch.float64)


def _sum(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None, backend: Backend | None = None) -> Tensor:
    return linear_nll(h, W, labels, bias=bias, backend=backend).square().sum()


def test_gradcheck(x: Head) -> None:
    leaves = x.leaves()
    assert torch.autograd.gradcheck(lambda h, W, b: linear_nll(h, W, x.labels, bias=b), leaves)


@pytest.mark.parametrize("argnums", [0, 1, 3])
def test_func_grad(x: Head, argnums: int) -> None:
    args = (x.h, x.W, x.labels, x.bias)
    torch.testing.assert_close(grad(_sum, argnums)(*args), grad(_sum, argnums)(*args, "reference"))


@pytest.mark.parametrize("argnums", [0, 1, 3])
def test_per_sample_gradients(x: Head, argnums: int) -> None:
    args = (x.h, x.W, x.labels, x.bias)
    actual = vmap(grad(_sum, argnums), in_dims=(0, None, 0, None))(*args)
    for index, row in enumerate(actual):
        expected = grad(_sum, argnums)(x.h[index], x.W, x.labels[index], x.bias, "reference")
        torch.testing.assert_close(row, expected)


def test_vmap_over_any_dimension(x: Head) -> None:
    expected = linear_nll(x.h, x.W, x.labels, bias=x.bias)
    columns = vmap(lambda h, y: linear_nll(h, x.W, y, bias=x.bias), in_dims=(1, 1), out_dims=1)
    torch.testing.assert_close(columns(x.h, x.labels), expected)
    nested = vmap(vmap(lambda h, y: linear_nll(h, x.W, y, bias=x.bias)))
    torch.testing.assert_close(nested(x.h, x.labels), expected)
    shared = vmap(lambda h: linear_nll(h, x.W, x.labels[0], bias=x.bias))
    torch.testing.assert_close(shared(x.h), linear_nll(x.h, x.W, x.labels[:1].expand(3, 4), bias=x.bias))


def test_vmap_over_heads(x: Head) -> None:
    heads = torch.stack([x.W, 2 * x.W])
    actual = vmap(lambda W: linear_nll(x.h, W, x.labels))(heads)
    torch.testing.assert_close(actual, torch.stack([linear_nll(x.h, W, x.labels) for W in heads]))


@pytest.mark.parametrize("argnums", [0, 1])
def test_jacrev(x: Head, argnums: int) -> None:
    def nll(h: Tensor, W: Tensor, backend: Backend | None = None) -> Tensor:
        return linear_nll(h, W, x.labels, backend=backend)

    torch.testing.assert_close(jacrev(nll, argnums)(x.h, x.W), jacrev(nll, argnums)(x.h, x.W, "reference"))


def test_gradients_of_gradients_are_refused(x: Head) -> None:
    h = x.h.requires_grad_()
    (first,) = torch.autograd.grad(linear_nll(h, x.W, x.labels).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_nll.*gradients of gradients"):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=r"linear_nll.*gradients of gradients"):
        grad(lambda h: grad(_sum)(h, x.W, x.labels, x.bias).sum())(x.h.detach())


def test_forward_mode_is_refused(x: Head) -> None:
    with pytest.raises(NotImplementedError):
        jvp(lambda h: linear_nll(h, x.W, x.labels), (x.h,), (x.h,))


def test_module_with_tied_weights(x: Head) -> None:
    table = torch.nn.Embedding(7, 5, dtype=torch.float64)
    tokens = x.labels.clamp_min(0)

    def loss(parameters: dict[str, Tensor], backend: Backend | None) -> Tensor:
        hidden = functional_call(table, parameters, (tokens,))
        return linear_nll(hidden, parameters["weight"], x.labels, backend=backend).sum()

    parameters = dict(table.named_parameters())
    torch.testing.assert_close(grad(loss)(parameters, None), grad(loss)(parameters, "reference"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(x: Head, dynamic: bool) -> None:
    torch._dynamo.reset()

    def loss(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        return (linear_nll(h, W, labels, bias=bias) * 2).sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (3, 2):
        leaves = x._replace(h=x.h[:rows]).leaves()
        args = (*leaves[:2], x.labels[:rows], leaves[2])
        actual, expected = compiled(*args), loss(*args)
        torch.testing.assert_close(actual, expected)
        for ours, theirs in zip(
            torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def test_raw_operators_are_well_registered(x: Head) -> None:
    leaves = x.leaves()
    opcheck(FORWARD, (*leaves, x.labels, *SETTINGS, 300))
    opcheck(FORWARD, (x.h.transpose(0, 1), x.W, None, x.labels.T, *SETTINGS, 0))
    _, lse, kept = FORWARD(x.h, x.W, x.bias, x.labels, *SETTINGS, 0)
    for need_h, need_weight in ((True, True), (False, True), (True, False)):
        opcheck(
            BACKWARD,
            (torch.ones_like(lse), x.h, x.W, x.bias, x.labels, lse, kept, *SETTINGS, need_h, need_weight),
        )


def test_raw_operators_differentiate_and_batch(x: Head) -> None:
    leaves = x.leaves()
    nll, lse, _ = FORWARD(*leaves, x.labels, *SETTINGS, 0)
    assert not lse.requires_grad
    logits = {"scale": SETTINGS[1], "softcap": SETTINGS[2]}
    expected = torch.autograd.grad(linear_nll(*leaves[:2], x.labels, bias=leaves[2], **logits).sum(), leaves)
    for ours, theirs in zip(torch.autograd.grad(nll.sum(), leaves), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    batched = vmap(lambda h, y: FORWARD(h, x.W, None, y, -100, 1.0, 0.0, 0)[0])(x.h, x.labels)
    torch.testing.assert_close(batched, linear_nll(x.h, x.W, x.labels))


def test_fake_tensors_on_a_gpu_have_the_right_shapes(x: Head) -> None:
    with torch._subclasses.FakeTensorMode():
        h = torch.empty(3, 4, 5, dtype=torch.bfloat16, device="meta")
        W = torch.empty(7, 5, dtype=torch.float16, device="meta")
        labels = torch.empty(3, 4, dtype=torch.long, device="meta")
        nll, lse, kept = FORWARD(h, W, None, labels, *SETTINGS, 7)
        gradients = BACKWARD(nll, h, W, None, labels, lse, kept, *SETTINGS, True, True)
    assert (nll.shape, nll.dtype, lse.dtype) == ((3, 4), torch.float32, torch.float32)
    assert [(tuple(g.shape), g.dtype) for g in gradients] == [
        ((3, 4, 5), torch.bfloat16),
        ((7, 5), torch.float16),
        ((0,), torch.float16),
    ]

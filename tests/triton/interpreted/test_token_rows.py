"""The Triton statistics and distances of rows, and their gradients, against the float64 reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from unlearn_kernels.reference import token_rows as reference
from unlearn_kernels.reference.token_rows import FIELDS, PAIR, SOFTPLUS, STATS
from unlearn_kernels.testing import assert_as_exact_as, randn
from unlearn_kernels.triton_kernels import token_rows as kernels

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = pytest.mark.parametrize("kind", [STATS, PAIR, SOFTPLUS])
# Fields that have no gradient, tails among them.
CONSTANT = {"std", "margin", "ref_nll", "ref_lse", "ref_mean", "lse_tail", "ref_lse_tail"}


def make(
    kind: int,
    rows: tuple[int, ...] = (2, 5),
    d: int = 7,
    V: int = 21,
    dtype: torch.dtype = torch.float32,
    labelled: bool = True,
    logits: tuple[float, float] = (1.5, 4.0),
    beta: float = 0.75,
) -> tuple[Any, ...]:
    labels = (torch.arange(torch.Size(rows).numel()) * 7 % V).view(rows)
    labels = labels.masked_fill(labels % 3 == 1, -100) if labelled else None
    h, weight, bias = randn(*rows, d), randn(V, d, seed=1) * d**-0.5, randn(V, seed=2)
    ref_h, ref_weight, ref_bias = (
        randn(*rows, d + 2, seed=3),
        randn(V, d + 2, seed=4) * d**-0.5,
        randn(V, seed=5),
    )
    head = tuple(x.to(dtype) for x in (h, weight, bias))
    other = tuple(x.to(dtype) for x in (ref_h, ref_weight, ref_bias)) if kind != STATS else (None,) * 3
    return *head, *other, labels, -100, *logits, kind, beta, 0.25


def doubled(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)


def upstream_of(fields: Tensor, kind: int) -> Tensor:
    names = FIELDS[kind]
    up = randn(*fields.shape, seed=9).to(fields.dtype)
    up[[i for i, name in enumerate(names) if name in CONSTANT]] = 0
    return up


def plain(arguments: tuple[Any, ...]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    fields, argmax = reference.linear_rows(*leaves, *arguments[3:])
    up = upstream_of(fields.detach(), arguments[10])
    return [fields.detach(), argmax, *torch.autograd.grad(fields, leaves, up)]


def ours(arguments: tuple[Any, ...]) -> list[Tensor]:
    fields, argmax = kernels.linear_rows_forward(*arguments)
    up = upstream_of(fields, arguments[10])
    return [fields, argmax, *kernels.linear_rows_backward(up, fields, argmax, *arguments, True, True)]


def check(arguments: tuple[Any, ...]) -> None:
    actual, eager, exact = ours(arguments), plain(arguments), plain(doubled(arguments))
    kept = torch.ones(actual[0].shape[1:], dtype=torch.bool) if arguments[6] is None else arguments[6] != -100
    if arguments[10] == STATS:
        assert torch.equal(actual[1][kept], exact[1][kept])
    for name, *tensors in zip(FIELDS[arguments[10]], actual[0], exact[0], eager[0], strict=True):
        if "tail" not in name:
            # A margin is the difference of two rounded logits.
            small = 16 * torch.finfo(tensors[0].dtype).eps if name == "margin" else None
            assert_as_exact_as(name, *tensors, floor=1e-12 if tensors[0].dtype == torch.float64 else small)
    for name, *tensors in zip(("h", "weight", "bias"), actual[2:], exact[2:], eager[2:], strict=True):
        assert tensors[0].dtype == tensors[2].dtype, name
        assert_as_exact_as(
            name, *tensors, factor=3, floor=1e-12 if tensors[0].dtype == torch.float64 else None
        )


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(kind: int, dtype: torch.dtype) -> None:
    check(make(kind, dtype=dtype))


@KINDS
@pytest.mark.parametrize("logits", [(1.0, 0.0), (0.5, 0.0)], ids=str)
def test_plain_and_scaled_logits(kind: int, logits: tuple[float, float]) -> None:
    check(make(kind, logits=logits))


@KINDS
@pytest.mark.parametrize(("rows", "d", "V"), [((3,), 1, 3), ((33,), 19, 70)], ids=str)
def test_shapes(kind: int, rows: tuple[int, ...], d: int, V: int) -> None:
    check(make(kind, rows, d, V))


@KINDS
def test_parts_of_the_vocabulary(kind: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(kernels, "_PROGRAMS", 2)
    check(make(kind, (5,), 9, 300))


@KINDS
def test_without_labels_every_row_counts(kind: int) -> None:
    check(make(kind, labelled=False))


@pytest.mark.parametrize("beta", [0.0, 10.0])
def test_shifted_targets(beta: float) -> None:
    check(make(PAIR, beta=beta))


def test_an_offset_instead_of_a_reference() -> None:
    arguments = make(SOFTPLUS)
    check((*arguments[:3], None, None, None, *arguments[6:]))


@KINDS
def test_sweep(kind: int) -> None:
    arguments = make(kind)
    fields, argmax, *_ = ours(arguments)
    up = upstream_of(fields, kind)
    for need_weight in (True, False):
        swept = kernels.linear_rows_sweep(up, *arguments, need_weight)
        expected = kernels.linear_rows_backward(up, fields, argmax, *arguments, True, need_weight)
        assert all(torch.equal(a, b) for a, b in zip(swept, (fields, argmax, *expected), strict=True))


@KINDS
@pytest.mark.parametrize("rows", [(0,), (2, 0)], ids=str)
def test_empty(kind: int, rows: tuple[int, ...]) -> None:
    found = ours(make(kind, rows))
    assert found[0].shape == (len(FIELDS[kind]), *rows)
    assert not any(g.any() for g in found[2:])


@KINDS
def test_rows_that_do_not_count_are_never_read(kind: int) -> None:
    arguments = make(kind)
    poisoned = arguments[0].masked_fill((arguments[6] == -100).unsqueeze(-1), float("nan"))
    for a, b in zip(ours(arguments), ours((poisoned, *arguments[1:])), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [float("-inf"), float("nan")])
def test_minus_infinity_and_nan_pass_through(value: float) -> None:
    arguments = make(STATS, logits=(1.0, 0.0))
    arguments[2][20] = value
    labels = arguments[6].masked_fill(arguments[6] == 20, 1)
    arguments = (*arguments[:6], labels, *arguments[7:])
    fields, expected = ours(arguments)[0], plain(arguments)[0]
    for name, actual, wanted in zip(FIELDS[STATS], fields, expected, strict=True):
        if "tail" not in name:
            torch.testing.assert_close(
                actual, wanted, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


def test_confident_rows_do_not_cancel() -> None:
    h, weight = torch.ones(1, 1), torch.linspace(-1, 0, 31).unsqueeze(1)
    weight[7] = 16.0
    arguments = (
        h,
        weight,
        torch.zeros(31),
        None,
        None,
        None,
        torch.tensor([7]),
        -100,
        1.0,
        0.0,
        STATS,
        0.0,
        0.0,
    )
    fields, exact = ours(arguments)[0], plain(doubled(arguments))[0]
    for name in ("nll", "std", "ceu"):
        at = FIELDS[STATS].index(name)
        torch.testing.assert_close(fields[at].double(), exact[at], rtol=2e-6, atol=0)


def test_labels_outside_the_vocabulary_give_nan() -> None:
    arguments = make(STATS)
    labels = arguments[6].clone()
    labels[0, 0] = 21
    fields, _, d_h, *_ = ours((*arguments[:6], labels, *arguments[7:]))
    assert fields[0].isnan().nonzero().tolist() == [[0, 0]]
    assert d_h.isnan().any(-1).nonzero().tolist() == [[0, 0]]

"""Dots, weighted sums, gradients and projections of linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import attribution
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import TwoSided, linear


class Layer(NamedTuple):
    """A (B, T, d), G (B, T, p); those of a second batch; weights; projections of both sides."""

    A: Tensor
    G: Tensor
    A2: Tensor
    G2: Tensor
    w: Tensor
    left: Tensor
    right: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.A, self.G, self.A2, self.G2


class Shape(NamedTuple):
    B: int
    T: int
    d: int
    p: int
    B2: int = 1
    k: int = 1

    def __str__(self) -> str:
        return f"B {self.B} x {self.B2}, T {self.T}, d {self.d}, p {self.p}, k {self.k}"


def _make(s: Shape) -> Callable[[str], Layer]:
    def make(device: str) -> Layer:
        shapes: tuple[tuple[int, ...], ...] = (
            (s.B, s.T, s.d), (s.B, s.T, s.p), (s.B2, s.T, s.d), (s.B2, s.T, s.p), (s.B,), (s.k, s.p), (s.k, s.d)
        )  # fmt: skip
        return Layer(*(testing.randn(*size, seed=i, device=device) for i, size in enumerate(shapes)))

    return make


def _double(function: Callable[..., Any], *names: str) -> Callable[[Layer], Any]:
    return lambda x: function(*(getattr(x, name).double() for name in names))


def _provider(name: str, function: Callable[[Layer], Any], role: Any = "peer") -> Provider:
    return Provider(name, lambda x: Call(lambda: function(x)), role)


def _case(
    verb: str, op: str, label: str, s: Shape, flops: int, reference: Callable[[Layer], Any], *providers: Provider,
    moved: int = 0, warm: Case | None = None,
) -> Case:  # fmt: skip
    return register(
        Case(
            f"per_sample.linear.{verb}/{label}/float32",
            ops=(op,),
            shape=str(s),
            dtype=torch.float32,
            flops=flops,
            bytes=4 * ((s.B + s.B2) * s.T * (s.d + s.p) + moved),
            make=_make(s),
            reference=reference,
            error=lambda _, output, exact: testing.relative_error(output, exact),
            providers=providers,
            bound=2e-6,
            warm=warm,
        )
    )


def _dots(label: str, s: Shape, warm: Case | None) -> Case:
    pairs, n1, n2 = s.B * s.B2, s.B * s.T, s.B2 * s.T
    direct = 2 * (n1 + n2) * s.d * s.p + 2 * pairs * s.d * s.p
    return _case(
        "dots",
        "linear_dots",
        label,
        s,
        min(direct, 2 * n1 * n2 * (s.d + s.p)),
        _double(attribution.materialised, "A", "G", "A2", "G2"),
        _provider("unlearn_kernels", lambda x: linear.dots(*x.sides), "ours"),
        _provider("tokens (GhostSuite)", lambda x: attribution.by_tokens(*x.sides)),
        _provider("torch materialised", lambda x: attribution.materialised(*x.sides)),
        warm=warm,
    )


def _dots_summed(label: str, s: Shape, warm: Case | None) -> Case:
    tokens = (s.B + s.B2) * s.T
    return _case(
        "dots_summed",
        "linear_dots",
        label,
        s,
        2 * tokens * s.d * s.p,
        _double(attribution.through_sum, "A", "G", "A2", "G2"),
        _provider("unlearn_kernels", lambda x: linear.dots(*x.sides, summed=True), "ours"),
        _provider("tokens (GhostSuite)", lambda x: attribution.by_tokens(*x.sides).sum(1)),
        _provider("torch through the sum", lambda x: attribution.through_sum(*x.sides)),
        warm=warm,
    )


def _scaled_product(A: Tensor, G: Tensor, w: Tensor) -> Tensor:
    return (G * w[:, None, None]).flatten(0, 1).T @ A.flatten(0, 1)


def _weighted_sum(label: str, s: Shape, warm: Case | None) -> Case:
    return _case(
        "weighted_sum",
        "linear_weighted_sum",
        label,
        s,
        2 * s.B * s.T * s.d * s.p,
        _double(_scaled_product, "A", "G", "w"),
        _provider("unlearn_kernels", lambda x: linear.weighted_sum(x.A, x.G, x.w).weight, "ours"),
        _provider("torch scaled copy", lambda x: _scaled_product(x.A, x.G, x.w)),
        moved=s.d * s.p,
        warm=warm,
    )


def _grads(label: str, s: Shape, warm: Case | None) -> Case:
    return _case(
        "grads",
        "linear_grads",
        label,
        s,
        2 * s.B * s.T * s.d * s.p,
        _double(lambda A, G: G.mT @ A, "A", "G"),
        _provider("unlearn_kernels", lambda x: linear.grads(x.A, x.G).weight, "ours"),
        _provider("torch bmm", lambda x: x.G.mT @ x.A),
        moved=s.B * s.d * s.p,
        warm=warm,
    )


def _two_sided(label: str, s: Shape, warm: Case | None) -> Case:
    return _case(
        "two_sided",
        "linear_two_sided",
        label,
        s,
        2 * s.B * s.T * s.k * (s.d + s.p + s.k),
        _double(attribution.two_products, "A", "G", "left", "right"),
        _provider("unlearn_kernels", lambda x: linear.project(x.A, x.G, TwoSided(x.left, x.right)), "ours"),
        _provider("torch products", lambda x: attribution.two_products(x.A, x.G, x.left, x.right)),
        _provider("outer products (LogIX)", lambda x: attribution.outer_products(x.A, x.G, x.left, x.right)),
        moved=s.B * s.k * s.k,
        warm=warm,
    )


def _projection(x: Layer) -> Projection:
    return Projection(x.A.shape[2] * x.G.shape[2], x.left.shape[0], seed=1)


def _sketch(label: str, s: Shape, warm: Case | None) -> Case:
    return _case(
        "sketch",
        "linear_sketch",
        label,
        s,
        2 * s.B * s.d * s.p * (s.T + s.k // 4),
        lambda x: _projection(x).project((x.G.mT.double() @ x.A.double()).flatten(1), backend="reference"),
        _provider("unlearn_kernels", lambda x: linear.project(x.A, x.G, _projection(x)), "ours"),
        _provider("materialised", lambda x: _projection(x)((x.G.mT @ x.A).flatten(1))),
        moved=s.B * s.k,
        warm=warm,
    )


_SMALL = Shape(4, 32, 64, 48, B2=2, k=16)
_VALIDATION, _LARGE = Shape(16, 256, 768, 768, B2=4), Shape(16, 512, 1024, 1024, k=64)
for _verb, _label, _shape in (
    (_dots, "16x4", _VALIDATION),
    (_dots, "16x16-short", Shape(16, 32, 768, 768, B2=16)),
    (_dots_summed, "16x4", _VALIDATION),
    (_weighted_sum, "L1", _LARGE),
    (_grads, "L1", _LARGE),
    (_two_sided, "L1-64x64", _LARGE),
    (_sketch, "256", Shape(8, 128, 256, 256, k=256)),
):
    _verb(_label, _shape, _verb(f"{_label}-small", _SMALL, None))

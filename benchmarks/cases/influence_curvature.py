"""Sums behind EK-FAC and Fisher matrices, DataInf, and the scan of a store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing


class Layer(NamedTuple):
    """Inputs (B, T, d) and gradients at the outputs (B, T, p)."""

    a: Tensor
    g: Tensor


class Attribution(NamedTuple):
    """Each layer's gradients (n, d) and query gradients (Q, d), and the rows' squared norms."""

    rows: list[Tensor]
    queries: list[Tensor]
    norms: Tensor


def _error(_: object, output: Tensor, reference: Tensor) -> float:
    return testing.relative_error(output, reference)


def _inputs(B: int, T: int, d: int, p: int) -> Callable[[str], Layer]:
    return lambda device: Layer(
        testing.randn(B, T, d, device=device), testing.randn(B, T, p, seed=1, device=device)
    )


def _squares(x: Layer) -> Tensor:
    return (x.g.mT @ x.a).square_().sum(0)


def _product(x: Layer) -> Tensor:
    flat = x.a.flatten(0, 1)
    return flat.T @ flat


def _rows(x: Layer) -> Tensor:
    return x.a.flatten(1).square().sum(0)


def _ours(name: str) -> Callable[[Layer], Any]:
    def run(x: Layer) -> Tensor:
        from unlearn_kernels import influence

        if name == "squared_gradients":
            return influence.squared_gradients(x.a, x.g)
        return influence.covariance(x.a) if name == "covariance" else influence.squared_rows(x.a.flatten(1))

    return run


_PLAIN = {"squared_gradients": _squares, "covariance": _product, "squared_rows": _rows}


def _sum(name: str, B: int, T: int, d: int, p: int, label: str, warm: Case | None) -> Case:
    flops = {
        "squared_gradients": 2 * B * T * d * p,
        "covariance": B * T * d * d,
        "squared_rows": 2 * B * T * d,
    }
    ours, plain = _ours(name), _PLAIN[name]
    return register(
        Case(
            f"influence.{name}/{label}/float32",
            ops=(name,),
            shape=f"{B} x {T}, {d} -> {p}",
            dtype=torch.float32,
            flops=flops[name],
            bytes=4 * B * T * (d + p * (name == "squared_gradients")),
            make=_inputs(B, T, d, p),
            reference=lambda x: plain(Layer(x.a.double().cpu(), x.g.double().cpu())),
            error=_error,
            providers=(
                Provider("unlearn_kernels", lambda x: Call(lambda: ours(x)), "ours"),
                Provider("torch", lambda x: Call(lambda: plain(x)), "plain"),
            ),
            bound=2e-6,
            threads=1,
            warm=warm,
        )
    )


def _attribution(layers: int, n: int, d: int, queries: int) -> Callable[[str], Attribution]:
    def make(device: str) -> Attribution:
        rows = [testing.randn(n, d, seed=i, device=device) for i in range(layers)]
        asked = [testing.randn(queries, d, seed=1000 + i, device=device) for i in range(layers)]
        return Attribution(rows, asked, torch.stack([x.double().square().sum(1) for x in rows]))

    return make


def _datainf(x: Attribution) -> Tensor:
    from unlearn_kernels import influence

    return influence.datainf(x.rows, x.queries, norms=x.norms)


def _three_products(x: Attribution) -> Tensor:
    from unlearn_kernels import influence

    total = torch.zeros(len(x.queries[0]), len(x.rows[0]), dtype=torch.float64, device=x.norms.device)
    damping = influence.datainf_damping(x.rows, x.norms)
    for g, v, norm, lam in zip(x.rows, x.queries, x.norms, damping, strict=True):
        products = v @ g.T
        weights = (products.double() / (lam + norm) / len(g)).to(g.dtype)
        total += (products - weights @ g @ g.T).double() / lam
    return total


def _datainf64(x: Attribution) -> Tensor:
    wide = Attribution(
        [r.double().cpu() for r in x.rows], [q.double().cpu() for q in x.queries], x.norms.cpu()
    )
    return _three_products(wide)


def _attributed(layers: int, n: int, d: int, queries: int, label: str) -> Case:
    return register(
        Case(
            f"influence.datainf/{label}/float32",
            ops=("datainf_scores",),
            shape=f"{layers} x {n} x {d}, {queries} queries",
            dtype=torch.float32,
            flops=6 * layers * n * d * queries,
            bytes=4 * layers * n * d,
            make=_attribution(layers, n, d, queries),
            reference=_datainf64,
            error=_error,
            providers=(
                Provider("unlearn_kernels", lambda x: Call(lambda: _datainf(x)), "ours"),
                Provider("three products of torch", lambda x: Call(lambda: _three_products(x)), "plain"),
            ),
            bound=2e-6,
            threads=1,
        )
    )


for _name in _PLAIN:
    _small = _sum(_name, 4, 16, 64, 48, "small", None)
    _sum(_name, 64, 64, 256, 1024, "llama-mlp", _small)
_attributed(96, 300, 8192, 4, "lora-300x786k")

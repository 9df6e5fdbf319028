"""Per-sample gradients of embeddings: norms, inner products with a sum, and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import elementwise
from benchmarks.peers import opacus
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_VALIDATION = 4  # samples whose sum the others are compared with


class Layer(NamedTuple):
    """Ids (B, T), output gradients G (B, T, d), weights of the samples, the table."""

    ids: Tensor
    G: Tensor
    w: Tensor
    table: Tensor

    @property
    def rows(self) -> int:
        """The vocabulary."""
        return self.table.shape[0]


def _make(B: int, T: int, V: int, d: int, zipf: bool) -> Callable[[str], Layer]:
    def make(device: str) -> Layer:
        generator = torch.Generator().manual_seed(0)
        odds = 1 / torch.arange(1, V + 1) if zipf else torch.ones(V)
        drawn = torch.multinomial(odds, B * T, replacement=True, generator=generator)
        ids = torch.randperm(V, generator=generator)[drawn].reshape(B, T).to(device)
        G, w, table = (
            testing.randn(*s, seed=i, device=device) for i, s in enumerate(((B, T, d), (B,), (V, d)))
        )
        return Layer(ids, G, w, table)

    return make


def _rows(inputs: Layer, sample: int) -> Tensor:
    """One sample's gradient, in float64."""
    out = torch.zeros(inputs.table.shape, dtype=torch.float64, device=inputs.G.device)
    return out.index_add_(0, inputs.ids[sample], inputs.G[sample].double())


def _reference_norms(inputs: Layer) -> Tensor:
    return torch.stack([_rows(inputs, i).square().sum() for i in range(len(inputs.ids))])


def _reference_dots(inputs: Layer) -> Tensor:
    total = sum(_rows(inputs, i) for i in range(_VALIDATION))
    return torch.stack([(_rows(inputs, i) * total).sum() for i in range(len(inputs.ids))])


def _reference_sum(inputs: Layer) -> Tensor:
    total = torch.zeros(inputs.table.shape, dtype=torch.float64, device=inputs.G.device)
    scaled = inputs.G.double() * inputs.w.double()[:, None, None]
    return total.index_add_(0, inputs.ids.flatten(), scaled.flatten(0, 1))


def _relative(_: Layer, got: Tensor, expected: Tensor) -> float:
    return testing.relative_error(got, expected)


def _norms(inputs: Layer) -> Call:
    from unlearn_kernels.per_sample import embedding

    return Call(lambda: embedding.sqnorms(inputs.ids, inputs.G, num_embeddings=inputs.rows))


def _dots(inputs: Layer) -> Call:
    from unlearn_kernels.per_sample import embedding

    ids, G = inputs.ids[:_VALIDATION], inputs.G[:_VALIDATION]
    return Call(lambda: embedding.dots(inputs.ids, inputs.G, ids, G, num_embeddings=inputs.rows, summed=True))


def _sum(inputs: Layer) -> Call:
    from unlearn_kernels.per_sample import embedding

    return Call(
        lambda: embedding.weighted_sum(inputs.ids, inputs.G, inputs.w, num_embeddings=inputs.rows).weight
    )


def _plain(inputs: Layer) -> Call:
    table = inputs.table.detach().requires_grad_()
    return Call(lambda: torch.autograd.grad(functional.embedding(inputs.ids, table), table, inputs.G))


def segments(ids: Tensor, G: Tensor, rows: int) -> Tensor:
    """The formula with a one-dimensional key: unique, then index_add."""
    keys = ids + rows * torch.arange(len(ids), device=ids.device)[:, None]
    known, place = torch.unique(keys, return_inverse=True)
    sums = G.new_zeros(len(known), G.shape[2]).index_add_(0, place.flatten(), G.flatten(0, 1))
    return G.new_zeros(len(ids)).index_add_(0, known // rows, sums.square().sum(1))


def mask(ids: Tensor, G: Tensor) -> Tensor:
    """Products of all pairs of tokens, kept where the ids are equal."""
    return ((G @ G.mT) * (ids[:, :, None] == ids[:, None])).sum((1, 2))


def _mask_compiled(inputs: Layer) -> Call:
    function = compiled(mask)
    return Call(lambda: function(inputs.ids, inputs.G))


def _index_add(inputs: Layer) -> Call:
    def run() -> Tensor:
        scaled = inputs.G * inputs.w[:, None, None]
        return torch.zeros_like(inputs.table).index_add_(0, inputs.ids.flatten(), scaled.flatten(0, 1))

    return Call(run)


_STREAM = Provider(
    "stream G once", lambda x: Call(lambda: torch.dot(x.G.view(-1), x.G.view(-1))), "plain", yardstick=True
)
_PLAIN = Provider("plain forward+backward", _plain, "plain", yardstick=True)
_NORMS = (
    Provider("unlearn_kernels", _norms, "ours"),
    _PLAIN,
    _STREAM,
    Provider(
        "opacus ghost", lambda x: Call(opacus.embedding_sqnorms(x.ids, x.G, x.rows)), requires=("opacus",)
    ),
    Provider("torch unique and index_add", lambda x: Call(lambda: segments(x.ids, x.G, x.rows))),
    Provider("torch T x T mask", lambda x: Call(lambda: mask(x.ids, x.G))),
    Provider("torch.compile", _mask_compiled, compiled=True),
)
_DOTS = (Provider("unlearn_kernels", _dots, "ours"), _PLAIN, _STREAM)
_SUM = (Provider("unlearn_kernels", _sum, "ours"), _PLAIN, Provider("torch index_add", _index_add))


def _case(verb: str, label: str, size: tuple[int, int, int, int], zipf: bool, warm: Case | None) -> Case:
    B, T, V, d = size
    providers, reference, tokens = {
        "sqnorms": (_NORMS, _reference_norms, B),
        "dots": (_DOTS, _reference_dots, B + _VALIDATION),
        "weighted_sum": (_SUM, _reference_sum, B),
    }[verb]
    return register(
        Case(
            f"per_sample.embedding.{verb}/{label}/float32",
            ops=(f"embedding_{verb}",),
            shape=f"B {B}, T {T}, V {V}, d {d}",
            dtype=torch.float32,
            flops=2 * tokens * T * d,
            bytes=4 * (tokens * T * d + (V * d if verb == "weighted_sum" else 0)),
            make=_make(B, T, V, d, zipf),
            reference=reference,
            error=(lambda _, got, expected: elementwise(got, expected)) if verb == "sqnorms" else _relative,
            providers=providers,
            bound=1e-6,
            warm=warm,
        )
    )


for _verb in ("sqnorms", "dots", "weighted_sum"):
    _small = _case(_verb, "small", (8, 64, 1000, 64), True, None)
    _case(_verb, "zipf", (16, 512, 32000, 768), True, _small)
    _case(_verb, "uniform", (16, 512, 32000, 768), False, _small)

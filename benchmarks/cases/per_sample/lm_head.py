"""Per-sample gradients of a language-model head.

"given G" is work on a gradient of the logits that is in memory already, B T V numbers that its extra memory does not
show; the others start from hidden states, as the operators do.
"""

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


class Head(NamedTuple):
    """Hidden states (B, T, d), head (V, d), labels and log-sum-exps (B, T), and those of other samples.

    G is the gradient of the logits, (B, T, V); ids (B, T) and E (B, T, d) belong to the tied embedding.
    """

    h: Tensor
    W: Tensor
    labels: Tensor
    lse: Tensor
    others: tuple[Tensor, Tensor, None, Tensor]
    G: Tensor
    ids: Tensor
    E: Tensor

    def tokens(self) -> tuple[Tensor, Tensor, None, Tensor]:
        return self.h, self.labels, None, self.lse


def logit_gradients(h: Tensor, W: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """softmax(h Wᵀ) - onehot, all of it in memory."""
    q = (h.to(lse.dtype) @ W.to(lse.dtype).T - lse[..., None]).exp()
    return q.scatter_add(-1, labels[..., None], -torch.ones_like(lse)[..., None])


def _tokens(B: int, T: int, W: Tensor, seed: int) -> tuple[Tensor, Tensor, None, Tensor]:
    h = testing.randn(B, T, W.shape[1], dtype=W.dtype, seed=seed, device=W.device.type)
    labels = torch.randint(0, W.shape[0], (B, T), generator=torch.Generator().manual_seed(seed)).to(W.device)
    lse = torch.stack([(x.float() @ W.float().T).logsumexp(-1) for x in h])
    return h, labels, None, lse


def _make(B: int, T: int, d: int, V: int, dtype: torch.dtype) -> Callable[[str], Head]:
    def make(device: str) -> Head:
        W = testing.randn(V, d, dtype=dtype, seed=2, device=device).mul_(d**-0.5)
        h, labels, _, lse = _tokens(B, T, W, 1)
        ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3)).to(device)
        E = testing.randn(B, T, d, dtype=dtype, seed=4, device=device)
        return Head(h, W, labels, lse, _tokens(B, T, W, 5), logit_gradients(h, W, labels, lse), ids, E)

    return make


def gram(h: Tensor, G: Tensor) -> Tensor:
    """Σ_ts (h_t·h_s)(g_t·g_s)."""
    h = h.to(G.dtype)
    return ((h @ h.mT) * (G @ G.mT)).sum((1, 2))


def materialise(h: Tensor, G: Tensor) -> Tensor:
    """G_iᵀH_i, all samples in memory."""
    return G.mT @ h.to(G.dtype)


def recomputed(h: Tensor, W: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """The norms from hidden states, through the logits' gradient in memory."""
    return gram(h, logit_gradients(h, W, labels, lse))


def _weights64(h: Tensor, W: Tensor, labels: Tensor, lse: Tensor) -> Tensor:
    """One sample's gradient in float64."""
    lse = (h.double() @ W.double().T).logsumexp(-1)
    return materialise(h.double(), logit_gradients(h.double(), W.double(), labels, lse))


def _norms64(x: Head) -> Tensor:
    found = [
        _weights64(h, x.W, labels, x.lse).square().sum() for h, labels in zip(x.h, x.labels, strict=True)
    ]
    return torch.stack(found)


def _dots64(x: Head) -> Tensor:
    total = sum(_weights64(h, x.W, y, x.lse) for h, y in zip(x.others[0], x.others[1], strict=True))
    found = [(_weights64(h, x.W, y, x.lse) * total).sum() for h, y in zip(x.h, x.labels, strict=True)]
    return torch.stack(found)


def _tied64(x: Head) -> Tensor:
    samples = zip(x.h, x.labels, x.ids, x.E, strict=True)
    return torch.stack([(_weights64(h, x.W, y, x.lse)[ids] * E).sum() for h, y, ids, E in samples])


def _plain(x: Head) -> Call:
    leaves = tuple(t.detach().requires_grad_() for t in (x.h, x.W))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(functional.linear(*leaves), leaves, x.G.to(x.h.dtype))

    return Call(run)


def _ours(x: Head) -> Call:
    from unlearn_kernels.per_sample import lm_head

    return Call(lambda: lm_head.sqnorms(x.h, x.W, x.labels, lse=x.lse))


def _ours_alone(x: Head) -> Call:
    from unlearn_kernels.per_sample import lm_head

    return Call(lambda: lm_head.sqnorms(x.h, x.W, x.labels))


def _ours_given(x: Head) -> Call:
    from unlearn_kernels.per_sample import linear

    return Call(lambda: linear.sqnorms(x.h, x.G))


def _ours_dots(x: Head) -> Call:
    from unlearn_kernels.per_sample import lm_head

    return Call(lambda: lm_head.dots(x.tokens(), x.others, x.W, summed=True))


def _torch_dots(x: Head) -> Tensor:
    (h, labels, _, lse), V = x.others, len(x.W)
    total = (logit_gradients(h, x.W, labels, lse).view(-1, V).T @ h.flatten(0, 1).to(lse.dtype)).flatten()
    G = logit_gradients(x.h, x.W, x.labels, x.lse)
    return torch.stack([materialise(a, g).flatten() @ total for a, g in zip(x.h, G, strict=True)])


def _ours_tied(x: Head) -> Call:
    from unlearn_kernels.per_sample import lm_head

    return Call(lambda: lm_head.tied_dots(x.ids, x.E, x.h, x.W, x.labels, lse=x.lse))


def _torch_tied(x: Head) -> Tensor:
    G = logit_gradients(x.h, x.W, x.labels, x.lse)
    q = G.gather(2, x.ids[:, None].expand(-1, x.h.shape[1], -1))
    return (q * (x.h @ x.E.mT)).sum((1, 2))


def _materialised_tied(x: Head) -> Tensor:
    weights = materialise(x.h, logit_gradients(x.h, x.W, x.labels, x.lse))
    embedding = torch.zeros_like(weights)
    embedding.scatter_add_(1, x.ids[..., None].expand_as(x.E), x.E.to(weights.dtype))
    return (weights * embedding).sum((1, 2))


def _compiled(x: Head) -> Call:
    function = compiled(recomputed)
    return Call(lambda: function(x.h, x.W, x.labels, x.lse))


_PLAIN = Provider("plain forward+backward", _plain, "plain", yardstick=True)
_NORMS = (
    Provider("unlearn_kernels", _ours, "ours"),
    Provider("unlearn_kernels, log-sum-exps computed", _ours_alone),
    Provider("unlearn_kernels, given G", _ours_given),
    _PLAIN,
    Provider("torch Gram", lambda x: Call(lambda: recomputed(x.h, x.W, x.labels, x.lse))),
    Provider("torch Gram, given G", lambda x: Call(lambda: gram(x.h, x.G))),
    Provider(
        "opacus ghost, given G",
        lambda x: Call(opacus.ghost_sqnorms(x.h, x.G, bias=False)),
        requires=("opacus",),
    ),
    Provider("torch einsum, given G", lambda x: Call(lambda: materialise(x.h, x.G).square().sum((1, 2)))),
    Provider("torch.compile", _compiled, compiled=True),
)
_DOTS = (
    Provider("unlearn_kernels", _ours_dots, "ours"),
    _PLAIN,
    Provider("torch, one gradient at a time", lambda x: Call(lambda: _torch_dots(x))),
)
_TIED = (
    Provider("unlearn_kernels", _ours_tied, "ours"),
    _PLAIN,
    Provider("torch gather", lambda x: Call(lambda: _torch_tied(x))),
    Provider("torch, both gradients in memory", lambda x: Call(lambda: _materialised_tied(x))),
)


def _case(
    verb: str, label: str, B: int, T: int, d: int, V: int, dtype: torch.dtype, warm: Case | None
) -> Case:
    logits = 2 * B * T * d * V
    flops = {
        "sqnorms": logits + min(logits, B * T * (T + 1) * (d + V)),
        "dots": 2 * logits + min(2 * (B * T) ** 2 * (d + V), 2 * logits + 2 * B * d * V),
        "tied_dots": 4 * B * T * T * d,
    }
    providers = {"sqnorms": _NORMS, "dots": _DOTS, "tied_dots": _TIED}
    reference = {"sqnorms": _norms64, "dots": _dots64, "tied_dots": _tied64}
    return register(
        Case(
            f"per_sample.lm_head.{verb}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(f"lm_head_{verb}",),
            shape=f"B {B}, T {T}, d {d}, V {V}",
            dtype=dtype,
            flops=flops[verb],
            bytes=(2 * B * T * d + (0 if verb == "tied_dots" else V * d)) * dtype.itemsize,
            make=_make(B, T, d, V, dtype),
            reference=reference[verb],
            error=lambda _, output, expected: (
                elementwise(output, expected)
                if verb == "sqnorms"
                else testing.relative_error(output, expected)
            ),
            providers=providers[verb],
            bound=1e-5,
            warm=warm,
        )
    )


for _verb in ("sqnorms", "dots", "tied_dots"):
    for _dtype in (torch.float32, torch.bfloat16) if _verb == "sqnorms" else (torch.float32,):
        _small = _case(_verb, "small", 2, 64, 128, 4000, _dtype, None)
        _case(_verb, "V32000", 4, 256, 768, 32_000, _dtype, _small)

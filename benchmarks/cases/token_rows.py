"""Statistics of a head's rows and distances to a reference, against materialised logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases.token_loss import LARGE
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_BETA = 10.0
_ROWS = 128  # at a time in float64


class Heads(NamedTuple):
    """Hidden states (B, T, d), head (V, d) and labels (B, T) of a policy; hidden states and head of a reference."""

    h: Tensor
    W: Tensor
    labels: Tensor
    ref_h: Tensor
    ref_head: Tensor


def _make(B: int, T: int, d: int, V: int) -> Callable[[str], Heads]:
    def make(device: str) -> Heads:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, V, (B, T), generator=generator).to(device)
        h, ref_h = (testing.randn(B, T, d, seed=seed, device=device) for seed in (1, 3))
        W, ref_head = (testing.randn(V, d, seed=seed, device=device).mul_(d**-0.5) for seed in (2, 4))
        return Heads(h, W, labels, ref_h, ref_head)

    return make


def logits_of(h: Tensor, W: Tensor) -> Tensor:
    """In float32 as model code has them, or float64."""
    logits = h @ W.T
    return logits if logits.dtype == torch.float64 else logits.float()


def eager_stats(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> list[Tensor]:
    """As Min-K++ and exact memorisation form them: log-probabilities, moments of them, an argmax."""
    logits = logits_of(h, W)
    log_p = logits.log_softmax(-1)
    p = logits.softmax(-1)
    picked = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mean = (p * log_p).sum(-1)
    variance = ((p * log_p.square()).sum(-1) - mean.square()).clamp_min(1e-6)
    return [-picked, mean, variance.sqrt(), (logits.argmax(-1) == labels).to(h.dtype)]


def two_forwards(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> list[Tensor]:
    """As open-unlearning's Min-K++ goes about it: a product for log-probabilities of labels, one for those of words.

    Only the head is done twice here; there it is the whole model.
    """
    words = logits_of(h, W).log_softmax(-1)
    tokens = logits_of(h, W).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mean = (torch.exp(words) * words).sum(-1)
    variance = (torch.exp(words) * torch.square(words)).sum(-1) - torch.square(mean)
    return [-tokens, mean, variance.clamp(min=1e-6).sqrt(), (words.argmax(-1) == labels).to(h.dtype)]


def _our_stats(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> list[Tensor]:
    from unlearn_kernels.token_loss import linear_stats

    found = linear_stats(h, W, labels)
    return [found.nll, found.mean, found.std, found.hit.to(h.dtype)]


def eager_kl(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    """KL(reference || policy) over all rows, as TOFU and open-unlearning form it."""
    with torch.no_grad():
        log_q = logits_of(ref_h, ref_head).log_softmax(-1).flatten(0, 1)
    log_p = logits_of(h, W).log_softmax(-1).flatten(0, 1)
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _our_kl(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_kl

    return linear_kl(h, W, (ref_h, ref_head), reduction="mean")


def eager_undial(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    """Cross-entropy to the reference with the label's logit lowered, as open-unlearning forms it."""
    with torch.no_grad():
        logits = logits_of(ref_h, ref_head)
        mask = torch.zeros_like(logits).scatter_(-1, labels.unsqueeze(-1), 1.0)
        target = (logits - mask * _BETA).softmax(-1)
    return functional.cross_entropy(logits_of(h, W).flatten(0, 1), target.flatten(0, 1))


def _our_undial(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_soft_ce

    return linear_soft_ce(h, W, labels, (ref_h, ref_head), beta=_BETA, reduction="mean")


def eager_ceu(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
    """Cross-entropy to the model's own distribution without the label, as open-unlearning forms it."""
    logits = logits_of(h, W).flatten(0, 1)
    at = labels.flatten().unsqueeze(-1)
    target = logits.detach().scatter(-1, at, float("-inf")).softmax(-1)
    return functional.cross_entropy(logits, target)


def _our_ceu(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_soft_ce

    return linear_soft_ce(h, W, labels, reduction="mean")


def eager_pdu(h: Tensor, W: Tensor, *_: Tensor) -> Tensor:
    """The mean squared distance of the largest logit from the mean one."""
    logits = logits_of(h, W)
    return (logits.amax(-1) - logits.mean(-1)).square().mean()


def _our_pdu(h: Tensor, W: Tensor, *_: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_maxmean

    found = linear_maxmean(h, W)
    return (found.max - found.mean).square().mean()


def eager_muse(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    """-log sigmoid of raw logits below the reference's, summed over the vocabulary and averaged over tokens."""
    with torch.no_grad():
        reference = logits_of(ref_h, ref_head)
    return -functional.logsigmoid(0.1 * (reference - logits_of(h, W))).sum(-1).mean()


def _our_muse(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_softplus

    return linear_softplus(h, W, (ref_h, ref_head), beta=0.1, reduction="mean")


def _forward(loss: Callable[..., Any]) -> Callable[[Heads], Call]:
    return lambda inputs: Call(lambda: [torch.stack(loss(*inputs))])


def _with_gradients(loss: Callable[..., Tensor]) -> Callable[[Heads], Call]:
    def build(inputs: Heads) -> Call:
        h, W = (t.detach().requires_grad_() for t in (inputs.h, inputs.W))

        def run() -> list[Tensor]:
            value = loss(h, W, *inputs[2:])
            return [value.detach(), *torch.autograd.grad(value, (h, W))]

        return Call(run)

    return build


def _parts(inputs: Heads) -> Iterator[Heads]:
    """A few rows at a time: the reference in float64 then fits where its peers do."""
    x = Heads(*(t.double() if t.is_floating_point() else t for t in inputs))
    rows = [t.flatten(0, 1) for t in (x.h, x.labels, x.ref_h)]
    for h, labels, ref_h in zip(*(t.split(_ROWS) for t in rows), strict=True):
        yield Heads(h[None], x.W, labels[None], ref_h[None], x.ref_head)


def _exact_stats(loss: Callable[..., Any]) -> Callable[[Heads], list[Tensor]]:
    def run(inputs: Heads) -> list[Tensor]:
        found = torch.cat([torch.stack(loss(*part)) for part in _parts(inputs)], 2)
        return [found.view(-1, *inputs.labels.shape)]

    return run


def _exact_gradients(loss: Callable[..., Tensor]) -> Callable[[Heads], list[Tensor]]:
    """Of a mean over rows, and of its gradients."""

    def run(inputs: Heads) -> list[Tensor]:
        total, d_h, d_W = 0.0, [], torch.zeros_like(inputs.W, dtype=torch.float64)
        for part in _parts(inputs):
            h, W = (t.detach().requires_grad_() for t in (part.h, part.W))
            value = loss(h, W, *part[2:]) * (part.labels.numel() / inputs.labels.numel())
            value.backward()
            total += value.detach()
            d_h.append(h.grad)
            d_W += W.grad
        return [torch.as_tensor(total), torch.cat(d_h, 1).view(inputs.h.shape), d_W]

    return run


def _error(_: Heads, output: list[Tensor], reference: list[Tensor]) -> float:
    return max(testing.relative_error(got, expected) for got, expected in zip(output, reference, strict=True))


class _Kind(NamedTuple):
    op: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    build: Callable[..., Any]
    exact: Callable[..., Any]
    products: int  # of 2 N V d operations each
    heads: int = 1  # a reference has its own


_KINDS = {
    "linear_stats": _Kind("linear_stats", _our_stats, eager_stats, _forward, _exact_stats, 1),
    "linear_kl": _Kind("linear_kl", _our_kl, eager_kl, _with_gradients, _exact_gradients, 4, 2),
    "linear_soft_ce": _Kind(
        "linear_soft_ce", _our_undial, eager_undial, _with_gradients, _exact_gradients, 4, 2
    ),
    "ceu": _Kind("linear_soft_ce", _our_ceu, eager_ceu, _with_gradients, _exact_gradients, 3),
    "linear_maxmean": _Kind("linear_maxmean", _our_pdu, eager_pdu, _with_gradients, _exact_gradients, 1),
    "linear_softplus": _Kind(
        "linear_softplus", _our_muse, eager_muse, _with_gradients, _exact_gradients, 4, 2
    ),
}


def _case(name: str, label: str, B: int, T: int, d: int, V: int, warm: Case | None) -> Case:
    kind = _KINDS[name]
    backward = kind.build is _with_gradients
    published = Provider("Min-K++ as published, two products", kind.build(two_forwards))
    return register(
        Case(
            f"token_loss.{name}/{label}/float32",
            ops=(kind.op,),
            shape=f"B {B}, T {T}, d {d}, V {V}, forward" + ("+backward" if backward else ""),
            dtype=torch.float32,
            flops=2 * kind.products * B * T * V * d,
            bytes=4 * V * d * (kind.heads + backward),
            make=_make(B, T, d, V),
            reference=kind.exact(kind.eager),
            error=_error,
            providers=(
                Provider("unlearn_kernels", kind.build(kind.ours), "ours"),
                Provider("torch eager", kind.build(kind.eager), "plain"),
                Provider("torch.compile", lambda x: kind.build(compiled(kind.eager))(x), compiled=True),
                *((published,) if name == "linear_stats" else ()),
            ),
            bound=1e-6,
            peer_bound=5e-2,
            relative_to="torch eager",
            warm=warm,
            memory_unit=4 * B * T * V,
        )
    )


for _name in _KINDS:
    _small = _case(_name, "small", 2, 32, 640, 2000, None)  # as deep as models: products predict the others
    for _shape in (("V32000", 4, 256, 768, 32_000), *LARGE):
        _case(_name, *_shape, _small)

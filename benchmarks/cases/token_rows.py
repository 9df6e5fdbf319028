"""Statistics of a head's rows and distances to a reference, against materialised logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_BETA = 10.0


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


def eager_stats(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> list[Tensor]:
    """As Min-K++ and exact memorisation form them: log-probabilities, moments of them, an argmax."""
    logits = (h @ W.T).float()
    log_p = logits.log_softmax(-1)
    p = logits.softmax(-1)
    picked = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    mean = (p * log_p).sum(-1)
    variance = ((p * log_p.square()).sum(-1) - mean.square()).clamp_min(1e-6)
    return [-picked, mean, variance.sqrt(), (logits.argmax(-1) == labels).to(h.dtype)]


def _our_stats(h: Tensor, W: Tensor, labels: Tensor, *_: Tensor) -> list[Tensor]:
    from unlearn_kernels.token_loss import linear_stats

    found = linear_stats(h, W, labels)
    return [found.nll, found.mean, found.std, found.hit.to(h.dtype)]


def eager_kl(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    """KL(reference || policy) over all rows, as TOFU and open-unlearning form it."""
    with torch.no_grad():
        log_q = (ref_h @ ref_head.T).float().log_softmax(-1).flatten(0, 1)
    log_p = (h @ W.T).float().log_softmax(-1).flatten(0, 1)
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True)


def _our_kl(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_kl

    return linear_kl(h, W, (ref_h, ref_head), reduction="mean")


def eager_undial(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    """Cross-entropy to the reference with the label's logit lowered, as open-unlearning forms it."""
    with torch.no_grad():
        logits = (ref_h @ ref_head.T).float()
        mask = torch.zeros_like(logits).scatter_(-1, labels.unsqueeze(-1), 1.0)
        target = (logits - mask * _BETA).softmax(-1)
    return functional.cross_entropy((h @ W.T).float().flatten(0, 1), target.flatten(0, 1))


def _our_undial(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_soft_ce

    return linear_soft_ce(h, W, labels, (ref_h, ref_head), beta=_BETA, reduction="mean")


def eager_pdu(h: Tensor, W: Tensor, *_: Tensor) -> Tensor:
    """The mean squared distance of the largest logit from the mean one."""
    logits = (h @ W.T).float()
    return (logits.amax(-1) - logits.mean(-1)).square().mean()


def _our_pdu(h: Tensor, W: Tensor, *_: Tensor) -> Tensor:
    from unlearn_kernels.token_loss import linear_maxmean

    found = linear_maxmean(h, W)
    return (found.max - found.mean).square().mean()


def eager_muse(h: Tensor, W: Tensor, labels: Tensor, ref_h: Tensor, ref_head: Tensor) -> Tensor:
    """-log sigmoid of raw logits below the reference's, summed over the vocabulary and averaged over tokens."""
    with torch.no_grad():
        reference = (ref_h @ ref_head.T).float()
    return -functional.logsigmoid(0.1 * (reference - (h @ W.T).float())).sum(-1).mean()


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


def _exact(loss: Callable[..., Any], build: Callable[..., Any]) -> Callable[[Heads], Any]:
    return lambda inputs: build(loss)(
        Heads(*(x.double() if x.is_floating_point() else x for x in inputs))
    ).run()


def _error(_: Heads, output: list[Tensor], reference: list[Tensor]) -> float:
    return max(testing.relative_error(got, expected) for got, expected in zip(output, reference, strict=True))


class _Kind(NamedTuple):
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    build: Callable[..., Any]
    products: int  # of 2 N V d operations each


_KINDS = {
    "linear_stats": _Kind(_our_stats, eager_stats, _forward, 1),
    "linear_kl": _Kind(_our_kl, eager_kl, _with_gradients, 4),
    "linear_soft_ce": _Kind(_our_undial, eager_undial, _with_gradients, 4),
    "linear_maxmean": _Kind(_our_pdu, eager_pdu, _with_gradients, 1),
    "linear_softplus": _Kind(_our_muse, eager_muse, _with_gradients, 4),
}


def _case(op: str, label: str, B: int, T: int, d: int, V: int, warm: Case | None) -> Case:
    kind = _KINDS[op]
    return register(
        Case(
            f"token_loss.{op}/{label}/float32",
            ops=(op,),
            shape=f"B {B}, T {T}, d {d}, V {V}, forward" + ("+backward" if kind.products > 1 else ""),
            dtype=torch.float32,
            flops=2 * kind.products * B * T * V * d,
            bytes=4 * V * d * (3 if kind.products > 1 else 1),
            make=_make(B, T, d, V),
            reference=_exact(kind.eager, kind.build),
            error=_error,
            providers=(
                Provider("unlearn_kernels", kind.build(kind.ours), "ours"),
                Provider("torch eager", kind.build(kind.eager), "plain"),
                Provider("torch.compile", lambda x: kind.build(compiled(kind.eager))(x), compiled=True),
            ),
            bound=1e-6,
            peer_bound=5e-2,
            relative_to="torch eager",
            warm=warm,
        )
    )


for _op in _KINDS:
    _small = _case(_op, "small", 2, 32, 64, 2000, None)
    _case(_op, "V32000", 4, 256, 768, 32_000, _small)

"""Likelihood losses of a language-model head, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from benchmarks.peers import liger
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_CHUNK = 128
_BETA = 0.1

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class Head(NamedTuple):
    """Hidden states (B, T, d), head (V, d), labels and upstream gradients (B, T), reference NLL (B,)."""

    h: Tensor
    W: Tensor
    labels: Tensor
    upstream: Tensor
    reference_nll: Tensor


class Gradients(NamedTuple):
    """The loss, and its gradients to the hidden states and to the head."""

    loss: Tensor
    h: Tensor
    W: Tensor


def make(B: int, T: int, d: int, V: int, dtype: torch.dtype) -> Callable[[str], Head]:
    def make(device: str) -> Head:
        generator = torch.Generator().manual_seed(0)
        h = testing.randn(B, T, d, dtype=dtype, seed=1, device=device)
        W = testing.randn(V, d, dtype=dtype, seed=2, device=device).mul_(d**-0.5)
        labels = torch.randint(0, V, (B, T), generator=generator).to(device)
        labels[:, : T // 8] = -100
        upstream = torch.rand(B, T, generator=generator).to(device)
        spread = torch.linspace(-20, 20, B, device=device)
        reference = (labels != -100).sum(1) * (torch.log(torch.tensor(float(V))) + 0.5) + spread
        return Head(h, W, labels, upstream, reference)

    return make


def eager(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """Per-token NLL through materialised logits, in float32 as model code does it."""
    logits = (h @ W.T).float()
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(
        labels.shape
    )


def recomputed(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """The same in chunks of tokens whose logits are computed again for the backward."""
    flat = zip(h.flatten(0, 1).split(_CHUNK), labels.flatten().split(_CHUNK), strict=True)
    parts = [checkpoint(eager, rows[None], W, wanted[None], use_reentrant=False)[0] for rows, wanted in flat]
    return torch.cat(parts).view(labels.shape)


def torch_chunked(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own chunked operator, with chunks at which it is about three times faster than by default."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_CHUNK)
    flat = functional.linear_cross_entropy(
        h.flatten(0, 1), W, labels.flatten(), reduction="none", options=options
    )
    return flat.view(labels.shape)


def npo(nll: Tensor, reference_nll: Tensor) -> Tensor:
    """-(2/beta) mean_s log sigmoid(beta (n_s - r_s))."""
    return -(2 / _BETA) * functional.logsigmoid(_BETA * (nll.sum(1) - reference_nll)).mean()


def _ours(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    from unlearn_kernels import token_loss

    return token_loss.linear_nll(h, W, labels)


def _nll_call(loss: Loss) -> Callable[[Head], Call]:
    def build(inputs: Head) -> Call:
        h, W = (t.detach().requires_grad_() for t in (inputs.h, inputs.W))

        def run() -> Gradients:
            nll = loss(h, W, inputs.labels)
            return Gradients(nll.detach(), *torch.autograd.grad(nll, (h, W), inputs.upstream))

        return Call(run)

    return build


def _mean_call(mean: Loss) -> Callable[[Head], Call]:
    return lambda inputs: _loss_call(inputs, lambda h, W: mean(h, W, inputs.labels))


def _ours_mean(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    from unlearn_kernels import token_loss

    return token_loss.linear_nll(h, W, labels, reduction="mean")


def eager_mean(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """The mean over the tokens that count, through materialised logits."""
    return functional.cross_entropy((h @ W.T).float().flatten(0, 1), labels.flatten())


def torch_chunked_mean(h: Tensor, W: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's own chunked operator, which makes gradients along with the mean."""
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=_CHUNK)
    return functional.linear_cross_entropy(h.flatten(0, 1), W, labels.flatten(), options=options)


def _loss_call(inputs: Head, loss: Callable[[Tensor, Tensor], Tensor]) -> Call:
    h, W = (t.detach().requires_grad_() for t in (inputs.h, inputs.W))

    def run() -> Gradients:
        value = loss(h, W)
        return Gradients(value.detach(), *torch.autograd.grad(value, (h, W)))

    return Call(run)


def _npo_of(loss: Loss) -> Callable[[Head], Call]:
    return lambda inputs: _loss_call(
        inputs, lambda h, W: npo(loss(h, W, inputs.labels), inputs.reference_nll)
    )


def _ours_npo(inputs: Head) -> Call:
    from unlearn_kernels import token_loss

    return _loss_call(
        inputs, lambda h, W: token_loss.npo(h, W, inputs.labels, inputs.reference_nll, beta=_BETA)
    )


def _liger_npo(inputs: Head) -> Call:
    h, W = (t.detach().requires_grad_() for t in (inputs.h, inputs.W))
    # A copy: Liger marks the labels' length as dynamic, which torch.compile would then find on our tensor.
    loss = liger.npo(h, W, inputs.labels.clone(), inputs.reference_nll, _BETA)

    def run() -> Gradients:
        value = loss()
        return Gradients(value.detach(), *torch.autograd.grad(value, (h, W)))

    return Call(run)


def _gradients64(inputs: Head, upstream: Tensor) -> Gradients:
    """Σ over tokens of upstream · (softmax - onehot), in float64, a chunk of tokens at a time."""
    h, W = inputs.h.flatten(0, 1).double(), inputs.W.double()
    nll, dh, dW = (
        torch.zeros(len(h), dtype=torch.float64, device=h.device),
        torch.zeros_like(h),
        torch.zeros_like(W),
    )
    labels, weights = inputs.labels.flatten(), upstream.flatten().double()
    for start in range(0, len(h), _CHUNK):
        at = torch.arange(start, min(start + _CHUNK, len(h)), device=h.device)
        at = at[labels[at] != -100]
        log_p = torch.log_softmax(h[at] @ W.T, dim=1)
        nll[at] = -log_p.gather(1, labels[at, None])[:, 0]
        d_logits = log_p.exp_()
        d_logits[torch.arange(len(at)), labels[at]] -= 1
        d_logits *= weights[at, None]
        dh[at] = d_logits @ W
        dW.addmm_(d_logits.T, h[at])
    return Gradients(nll.view(inputs.labels.shape), dh.view(inputs.h.shape), dW)


def _nll64(inputs: Head) -> Gradients:
    return _gradients64(inputs, inputs.upstream)


def _mean64(inputs: Head) -> Gradients:
    kept = (inputs.labels != -100).double()
    share = kept / kept.sum()
    found = _gradients64(inputs, share)
    return Gradients((found.loss * share).sum(), found.h, found.W)


def npo64(inputs: Head) -> Gradients:
    nll = _nll_only64(inputs).requires_grad_()
    value = npo(nll, inputs.reference_nll.double())
    (upstream,) = torch.autograd.grad(value, nll)
    found = _gradients64(inputs, upstream)
    return Gradients(value.detach(), found.h, found.W)


def _nll_only64(inputs: Head) -> Tensor:
    return _gradients64(inputs, torch.zeros_like(inputs.upstream)).loss


def error(_: Head, output: Gradients, reference: Gradients) -> float:
    return max(testing.relative_error(got, expected) for got, expected in zip(output, reference, strict=True))


def _parts(_: Head, output: Gradients, reference: Gradients) -> dict[str, float]:
    return {
        name: testing.relative_error(getattr(output, name), getattr(reference, name))
        for name in ("loss", "h", "W")
    }


def _compiled(inputs: Head) -> Call:
    return _nll_call(compiled(eager))(inputs)


_NLL = (
    Provider("unlearn_kernels", _nll_call(_ours), "ours"),
    Provider("torch eager", _nll_call(eager), "plain"),
    Provider("torch.compile", _compiled, compiled=True),
    Provider("torch linear_cross_entropy, chunked", _nll_call(torch_chunked)),
    Provider("torch checkpoint, 128 tokens", _nll_call(recomputed)),
)
_MEAN = (
    Provider("unlearn_kernels", _mean_call(_ours_mean), "ours"),
    Provider("torch eager", _mean_call(eager_mean), "plain"),
    Provider("torch.compile", lambda x: _mean_call(compiled(eager_mean))(x), compiled=True),
    Provider("torch linear_cross_entropy, chunked", _mean_call(torch_chunked_mean)),
    Provider(
        "liger fused linear cross-entropy",
        _mean_call(liger.fused_mean),
        requires=("liger_kernel",),
        devices=("cuda",),
    ),
)
_NPO = (
    Provider("unlearn_kernels", _ours_npo, "ours"),
    Provider("torch eager", _npo_of(eager), "plain"),
    Provider("torch.compile", lambda x: _npo_of(compiled(eager))(x), compiled=True),
    Provider("liger chunked, a sequence at a time", _liger_npo, requires=("liger_kernel",)),
)


class _Kind(NamedTuple):
    reference: Callable[[Head], Gradients]
    providers: tuple[Provider, ...]


_KINDS = {
    "linear_nll": _Kind(_nll64, _NLL),
    "linear_nll_mean": _Kind(_mean64, _MEAN),
    "npo": _Kind(npo64, _NPO),
}


def _case(
    kind: str, label: str, B: int, T: int, d: int, V: int, dtype: torch.dtype, warm: Case | None
) -> Case:
    head = V * d * dtype.itemsize
    return register(
        Case(
            f"token_loss.{kind}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=("linear_nll",),
            shape=f"B {B}, T {T}, d {d}, V {V}, forward+backward",
            dtype=dtype,
            flops=6 * B * T * V * d,
            bytes=3 * head + 2 * B * T * d * dtype.itemsize,
            make=make(B, T, d, V, dtype),
            reference=_KINDS[kind].reference,
            error=error,
            providers=_KINDS[kind].providers,
            bound=1e-6 if dtype == torch.float32 else 2.0**-8,
            peer_bound=5e-2,
            relative_to="torch eager",
            metrics=_parts,
            memory_unit=4 * B * T * V,
            warm=warm,
        )
    )


# Labels, and the shapes of heads: of Llama-3.2-1B with short answers, and of Gemma-3-270m with long ones.
_MIDDLE = "V32000", 4, 256, 768, 32_000
LARGE = (("V128256", 4, 64, 2048, 128_256), ("V262144", 2, 512, 640, 262_144))

for _dtype in (torch.float32, torch.bfloat16):
    for _kind in _KINDS if _dtype == torch.float32 else ("linear_nll",):
        _small = _case(_kind, "small", 2, 64, 128, 4000, _dtype, None)
        if _dtype == torch.float32:
            for _shape in (_MIDDLE, *LARGE):
                _case(_kind, *_shape, _dtype, _small)

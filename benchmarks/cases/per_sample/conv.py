"""Per-sample gradients of convolutions: squared norms, dot products, and the weighted sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.accuracy import elementwise
from benchmarks.peers import opacus
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing
from unlearn_kernels.reference.per_sample.conv import conv_grads


class Layer(NamedTuple):
    """Inputs A (B, C, H, W), output gradients G (B, O, ...), weights (B,), and what a plain backward needs."""

    A: Tensor
    G: Tensor
    w: Tensor
    weight: Tensor
    bias: Tensor
    stride: int

    @property
    def arguments(self) -> dict[str, Any]:
        """How the public functions and `torch.nn.Conv2d` name the layer."""
        size, groups = self.weight.shape[-1], self.A.shape[1] // self.weight.shape[1]
        return {"kernel_size": size, "stride": self.stride, "padding": size // 2, "groups": groups}


def _make(B: int, C: int, D: int, H: int, k: int, stride: int, groups: int) -> Callable[[str], Layer]:
    def make(device: str) -> Layer:
        out = (H - 1) // stride + 1
        shapes = ((B, C, H, H), (B, D, out, out), (B,), (D, C // groups, k, k), (D,))
        return Layer(*(testing.randn(*s, seed=i, device=device) for i, s in enumerate(shapes)), stride)

    return make


def _exact(inputs: Layer, w: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of weight and bias in float64, sample by sample, or their sum."""
    layer = inputs.arguments
    k, s, p = layer["kernel_size"], layer["stride"], layer["padding"]
    window = [1, k, k, 1, s, s, 0, p, p, 1, 1, 1]
    a, g = (x.unsqueeze(2).double() for x in (inputs.A, inputs.G))
    return conv_grads(a, g, w, window, layer["groups"], True)


def _exact_norms(inputs: Layer) -> Tensor:
    pieces = (inputs._replace(A=inputs.A[i : i + 1], G=inputs.G[i : i + 1]) for i in range(len(inputs.A)))
    return torch.stack([sum(x.square().sum() for x in _exact(piece)) for piece in pieces])


def _exact_dots(inputs: Layer) -> Tensor:
    rows = torch.cat([x.flatten(1) for x in _exact(inputs)], 1)
    return rows @ rows[: _few(inputs)].T


def _few(inputs: Layer) -> int:
    return max(1, len(inputs.A) // 8)


def _ours(verb: str) -> Callable[[Layer], Call]:
    def build(inputs: Layer) -> Call:
        from unlearn_kernels.per_sample import conv

        few = _few(inputs)
        arguments = {
            "sqnorms": (inputs.A, inputs.G),
            "dots": (inputs.A, inputs.G, inputs.A[:few], inputs.G[:few]),
            "weighted_sum": (inputs.A, inputs.G, inputs.w),
        }[verb]
        return Call(lambda: getattr(conv, verb)(*arguments, bias=True, **inputs.arguments))

    return build


def _convolve(inputs: Layer, A: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = inputs.arguments
    return functional.conv2d(A, weight, bias, layer["stride"], layer["padding"], 1, layer["groups"])


def _plain(inputs: Layer) -> Call:
    leaves = tuple(t.detach().requires_grad_() for t in (inputs.A, inputs.weight, inputs.bias))

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(_convolve(inputs, *leaves), leaves, inputs.G)

    return Call(run)


def _wgrad(inputs: Layer, A: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias by the library's backward of a convolution."""
    layer, mask = inputs.arguments, [False, True, True]
    pairs = ([layer[name]] * 2 for name in ("stride", "padding"))
    found = torch.ops.aten.convolution_backward(
        G, A, inputs.weight, list(inputs.bias.shape), *pairs, [1, 1], False, [0, 0], layer["groups"], mask
    )
    return found[1], found[2]


def _loop(inputs: Layer) -> Call:
    def norm(i: int) -> Tensor:
        weight, bias = _wgrad(inputs, inputs.A[i : i + 1], inputs.G[i : i + 1])
        return weight.flatten().dot(weight.flatten()) + bias.dot(bias)

    return Call(lambda: torch.stack([norm(i) for i in range(len(inputs.A))]))


def _scaled(inputs: Layer) -> Call:
    return Call(lambda: _wgrad(inputs, inputs.A, inputs.G * inputs.w[:, None, None, None]))


def _per_sample(inputs: Layer) -> Callable[[], tuple[Tensor, Tensor]]:
    def loss(weight: Tensor, bias: Tensor, a: Tensor, g: Tensor) -> Tensor:
        return (_convolve(inputs, a[None], weight, bias)[0] * g).sum()

    grads = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, None, 0, 0))
    return lambda: grads(inputs.weight, inputs.bias, inputs.A, inputs.G)


def _vmap(inputs: Layer) -> Call:
    grads = _per_sample(inputs)
    return Call(lambda: sum(x.flatten(1).square().sum(1) for x in grads()))


def _materialised_dots(inputs: Layer) -> Call:
    grads, few = _per_sample(inputs), _few(inputs)

    def run() -> Tensor:
        rows = torch.cat([x.flatten(1) for x in grads()], 1)
        return rows @ rows[:few].T

    return Call(run)


def _opacus(inputs: Layer) -> Call:
    return Call(opacus.conv_sqnorms(inputs.A, inputs.G, **inputs.arguments))


_YARDSTICK = Provider("plain forward+backward", _plain, "plain", yardstick=True)
_VERBS: dict[str, tuple[str, Callable[[Layer], Any], tuple[Provider, ...]]] = {
    "sqnorms": (
        "conv_sqnorms",
        _exact_norms,
        (
            Provider("opacus materialise", _opacus, requires=("opacus",)),
            Provider("torch vmap(grad)", _vmap),
            Provider("aten weight gradient, one by one", _loop),
        ),
    ),
    "dots": ("conv_dots", _exact_dots, (Provider("torch vmap(grad), matmul", _materialised_dots),)),
    "weighted_sum": (
        "conv_grads",
        lambda inputs: _exact(inputs, inputs.w.double()),
        (Provider("aten weight gradient of scaled G", _scaled),),
    ),
}


def _error(_: Layer, output: Any, reference: Any) -> float:
    if isinstance(output, Tensor):
        return testing.relative_error(output, reference.reshape(output.shape))
    pairs = zip(output, reference, strict=True)
    return max(testing.relative_error(x, y.reshape(x.shape)) for x, y in pairs)


def _norm_error(_: Layer, output: Tensor, reference: Tensor) -> float:
    return elementwise(output, reference)


def _case(verb: str, label: str, shape: tuple[int, ...], stride: int, groups: int, warm: Case | None) -> Case:
    B, C, D, H, k = shape
    op, reference, peers = _VERBS[verb]
    T, d = ((H - 1) // stride + 1) ** 2, C // groups * k * k
    direct, gram = 2 * T * d * D, T * (T + 1) * (d * groups + D)
    extra = 2 * B * max(1, B // 8) * d * D if verb == "dots" else 0
    return register(
        Case(
            f"per_sample.conv.{verb}/{label}/float32",
            ops=(op,),
            shape=f"B {B}, {C} to {D} channels, {k} x {k}, {H} x {H}, stride {stride}, groups {groups}",
            dtype=torch.float32,
            flops=B * (min(direct, gram) if verb == "sqnorms" else direct) + extra,
            bytes=4 * B * (C * H * H + D * T),
            make=_make(*shape, stride, groups),
            reference=reference,
            error=_norm_error if verb == "sqnorms" else _error,
            providers=(Provider("unlearn_kernels", _ours(verb), "ours"), _YARDSTICK, *peers),
            bound=1e-5,
            warm=warm,
        )
    )


for _verb in _VERBS:
    _small = _case(_verb, "small", (4, 8, 12, 10, 3), 1, 1, None)
    _case(_verb, "vgg", (32, 64, 64, 32, 3), 1, 1, _small)
    if _verb == "sqnorms":
        _case(_verb, "stem", (8, 3, 64, 112, 7), 2, 1, _small)
        _case(_verb, "resnet-late", (16, 512, 512, 7, 3), 1, 1, _small)
        _case(_verb, "depthwise", (16, 144, 144, 28, 3), 1, 144, _small)

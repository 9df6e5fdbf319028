"""Book-keeping with hooks, as fastDP does it: ghost norms or gradients by its memory rule, one backward, and
the clipped sum from what the hooks kept.

The choice (Gram where `2 T^2 <= d p`), the one-hot embedding sum and the unfolded convolution are those of
github.com/awslabs/fast-differential-privacy; the engine itself patches the autograd of one version of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Factors = tuple[Tensor, Tensor]


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _is_rms(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm")


def _as_products(module: nn.Module, x: Tensor, g: Tensor) -> Factors:
    """`(A, G)` whose per-sample products are the gradient of the weight; (B, T, d) and (B, T, p)."""
    if isinstance(module, nn.Conv2d):
        columns = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
        return columns.mT, g.flatten(2).mT
    return x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(g), -1, g.shape[-1])


def _gradient_of_scale(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        unit = F.group_norm(x, module.num_groups, eps=module.eps)
        return (unit * g).flatten(2).sum(2)
    if _is_rms(module):
        eps = module.variance_epsilon
        return (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * g).flatten(1, -2).sum(1)
    return (F.layer_norm(x, module.normalized_shape, eps=module.eps) * g).flatten(1, -2).sum(1)


class _Layer:
    """What the hooks keep of one module, and the two sums made from it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.x: Tensor | None = None
        self.g: Tensor | None = None

    def keep_input(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.x = inputs[0].detach()
        if not output.requires_grad:  # no weight has a gradient, so that none is computed
            output.requires_grad_()
        output.register_hook(self.keep_gradient)

    def keep_gradient(self, g: Tensor) -> None:
        self.g = g

    def _products(self) -> Factors:
        assert self.x is not None
        assert self.g is not None
        return _as_products(self.module, self.x, self.g)

    def sqnorms(self) -> Tensor:
        x, g, module = self.x, self.g, self.module
        assert x is not None
        assert g is not None
        if isinstance(module, nn.Embedding):
            return ((x[:, :, None] == x[:, None]) * (g @ g.mT)).sum((1, 2))
        if not isinstance(module, nn.Linear | nn.Conv2d) and not _is_transposed(module):
            total = _gradient_of_scale(module, x, g).square().sum(1)
        else:
            A, G = self._products()
            if 2 * A.shape[1] ** 2 <= A.shape[2] * G.shape[2]:
                total = ((A @ A.mT) * (G @ G.mT)).sum((1, 2))
            else:
                total = (G.mT @ A).square().sum((1, 2))
        return total if self._bias() is None else total + self._bias_grads().square().sum(1)

    def _bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def _bias_grads(self) -> Tensor:
        assert self.g is not None
        first = isinstance(self.module, nn.Conv2d | nn.GroupNorm)
        g = self.g if first else self.g.movedim(-1, 1)
        return g.reshape(*g.shape[:2], -1).sum(2)

    def weighted_sum(self, w: Tensor) -> Iterator[Tensor]:
        x, g, module = self.x, self.g, self.module
        assert x is not None
        assert g is not None
        if isinstance(module, nn.Embedding):
            one_hot = F.one_hot(x, module.num_embeddings).to(g)
            yield torch.einsum("btv,btd->vd", one_hot, g * w[:, None, None])
        elif isinstance(module, nn.Linear | nn.Conv2d) or _is_transposed(module):
            A, G = self._products()
            product = torch.einsum("btp,btd->pd", G * w[:, None, None], A)
            yield (product.mT if _is_transposed(module) else product).reshape_as(module.weight)
        else:
            yield w @ _gradient_of_scale(module, x, g)
        if self._bias() is not None:
            yield w @ self._bias_grads()


def layers(model: nn.Module) -> list[_Layer]:
    """The layers with weights, hooked, in the order of the model's parameters."""
    found = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            layer = _Layer(module)
            module.register_forward_hook(layer.keep_input)
            found.append(layer)
    for p in model.parameters():
        p.requires_grad_(False)
    return found


def step(
    model: nn.Module, losses: Callable[[], Tensor], weights: Callable[[Tensor], Tensor], clip: bool
) -> Callable[[], Tensor]:
    """A call that returns the norms, or the clipped gradient flattened."""
    kept = layers(model)

    def run() -> Tensor:
        losses().sum().backward()
        norms = torch.stack([layer.sqnorms() for layer in kept]).sum(0).sqrt()
        if not clip:
            return norms
        w = weights(norms)
        return torch.cat([part.flatten() for layer in kept for part in layer.weighted_sum(w)])

    return run

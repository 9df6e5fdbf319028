"""opacus: per-sample norms of a linear layer by its ghost-clipping sampler and by its gradient sampler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _layer(A: Tensor, G: Tensor, bias: bool = True) -> nn.Linear:
    # The samplers look at the parameters' requires_grad only, so the weights need no memory.
    return nn.Linear(A.shape[-1], G.shape[-1], bias=bias, device="meta")


def ghost_sqnorms(A: Tensor, G: Tensor, bias: bool = True) -> Callable[[], Tensor]:
    """Squared norms over the parameters, each from its own pair of T × T Gram matrices."""
    from opacus.grad_sample.linear import compute_linear_norm_sample

    layer = _layer(A, G, bias)

    def run() -> Tensor:
        norms = compute_linear_norm_sample(layer, [A], G)
        return torch.stack([norm.square() for norm in norms.values()]).sum(0)

    return run


def materialised_sqnorms(A: Tensor, G: Tensor) -> Callable[[], Tensor]:
    """Squared norms of the per-sample gradients, formed one by one in memory."""
    from opacus.grad_sample.linear import compute_linear_grad_sample

    layer = _layer(A, G)

    def run() -> Tensor:
        grads = compute_linear_grad_sample(layer, [A], G)
        norms = torch.stack([grad.reshape(len(A), -1).norm(2, dim=-1) for grad in grads.values()], dim=1)
        return norms.square().sum(dim=1)

    return run


def embedding_sqnorms(ids: Tensor, G: Tensor, num_embeddings: int) -> Callable[[], Tensor]:
    """Squared norms by the ghost-clipping sampler: unique (sample, id) pairs, then an index_add."""
    from opacus.grad_sample.embedding import compute_embedding_norm_sample

    layer = nn.Embedding(num_embeddings, G.shape[-1], device="meta")
    return lambda: compute_embedding_norm_sample(layer, [ids], G)[layer.weight].square()


def norm_sqnorms(layer: nn.Module, X: Tensor, G: Tensor) -> Callable[[], Tensor]:
    """Squared norms from the per-sample gradients of a normalisation layer, for which Opacus has no norm sampler."""
    from opacus.grad_sample.grad_sample_module import GradSampleModule

    compute = GradSampleModule.GRAD_SAMPLERS[type(layer)]

    def run() -> Tensor:
        grads = compute(layer, [X], G)
        norms = torch.stack([grad.reshape(len(X), -1).norm(2, dim=-1) for grad in grads.values()], dim=1)
        return norms.square().sum(dim=1)

    return run


def conv_sqnorms(A: Tensor, G: Tensor, **layer: Any) -> Callable[[], Tensor]:
    """The same for a convolution in two dimensions, from an unfolded input."""
    from opacus.grad_sample.conv import compute_conv_grad_sample

    module = nn.Conv2d(A.shape[1], G.shape[1], device="meta", **layer)

    def run() -> Tensor:
        grads = compute_conv_grad_sample(module, [A], G)
        return torch.stack([x.flatten(1).square().sum(1) for x in grads.values()]).sum(0)

    return run

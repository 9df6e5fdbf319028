"""Influence: which training texts are behind a few queries?

The influence of training text n on query q is taken as the cosine of their preconditioned gradients,

    cos(C^-1/2 P g_q, C^-1/2 P g_n),   C = mean_n r_n r_n^T + damping * tr/k * I,   r_n = P g_n / |P g_n|,

with P a random projection and g the gradient of the text's negative log-likelihood in one weight matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .capture import captured
from .model import GPT, pad
from .operators import Operators, Projection

DAMPING = 1.0


def target(model: GPT) -> torch.nn.Linear:
    """The layer whose gradients are compared: the second of the first block's perceptron.

    Of the perceptrons' layers its gradients tell modules apart best, on average over the larger modules.
    """
    return model.linears()["blocks.0.down"]


def gradient_rows(
    model: GPT, operators: Operators, projection: Projection, sequences: Sequence[Tensor]
) -> Tensor:
    """Projected per-sample gradients of the negative log-likelihood of each text, `(B, k)`."""
    inputs, labels = pad(sequences, model.head.device)
    with captured([target(model)]) as layers:
        loss = operators.token_nll(model(inputs), model.head, labels).sum()
    activations, outputs = layers[0]
    (gradients,) = torch.autograd.grad(loss, [outputs])
    return projection(torch.einsum("bto,bti->boi", gradients, activations).flatten(1))


def precondition(rows: Tensor, training: int) -> Tensor:
    """Unit rows times `C^-1/2`, unit again; C is the second moment of the first `training` rows, damped."""
    rows = F.normalize(rows, dim=1)
    moment = rows[:training].T @ rows[:training] / training
    moment.diagonal().add_(DAMPING * moment.trace() / moment.shape[0])
    values, vectors = torch.linalg.eigh(moment)
    return F.normalize(rows @ (vectors * values.rsqrt()) @ vectors.T, dim=1)


def search(operators: Operators, rows: Tensor, queries: int, k: int) -> Tensor:
    """The `k` training texts with the largest mean influence on the queries, the last `queries` rows."""
    training = rows.shape[0] - queries
    rows = precondition(rows, training)
    return operators.topk(rows[training:].mean(0, keepdim=True), rows[:training], k)[0]

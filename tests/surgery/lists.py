"""Gradient lists that conflict, in every layout that the operators must take."""

import torch
from torch import Tensor

from unlearn_kernels.testing import randn

SHAPES = ((257, 129), (1,), (1000,), (3, 5, 7), (), (16, 1024), (40_000,))


def gradients(
    sets: int, *dtypes: torch.dtype, shapes: tuple[tuple[int, ...], ...] = SHAPES, seed: int = 0
) -> list[list[Tensor]]:
    """Sets that conflict with the first one; set k has dtype `dtypes[k % len(dtypes)]`."""
    dtypes = dtypes or (torch.float32,)
    first = [randn(*shape, seed=seed + i, dtype=torch.float64) for i, shape in enumerate(shapes)]
    found = []
    for k in range(sets):
        noise = [
            randn(*shape, seed=seed + 100 * (k + 1) + i, dtype=torch.float64)
            for i, shape in enumerate(shapes)
        ]
        values = first if k == 0 else [n - 0.3 * f for f, n in zip(first, noise, strict=True)]
        found.append([x.to(dtypes[k % len(dtypes)]) for x in values])
    return found


def clones(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides, expanded ones included in their dense form."""
    return [x.clone() for x in tensors]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().double().reshape(-1) for x in tensors])


def exact_gramian(sets: list[list[Tensor]]) -> Tensor:
    J = torch.stack([flat(g) for g in sets])
    return J @ J.T


def agem(forget: Tensor, retain: Tensor) -> Tensor:
    """The projection of one long float64 vector, from the definition."""
    dot = forget @ retain
    return forget - torch.clamp(dot, max=0.0) / (retain @ retain) * retain


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The values of a matrix in memory of other strides."""
    rows, cols = x.shape
    return {
        "transposed": x.T.contiguous().T,
        "padded rows": torch.zeros(rows, cols + 3, dtype=x.dtype)
        .as_strided((rows, cols), (cols + 3, 1))
        .copy_(x),
        "every other": torch.zeros(rows, cols, 2, dtype=x.dtype)[..., 1].copy_(x),
        "offset": torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(rows, cols).copy_(x),
    }

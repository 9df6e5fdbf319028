"""Lists of tensors for the tests of kernels over lists."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from unlearn_kernels.testing import randn

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (F32, F64, BF16, F16)
SHAPES = ((3, 5), (2500,), (), (0,), (17, 130))
MIXES = pytest.mark.parametrize("dtypes", [*((d,) for d in DTYPES), (F32, BF16), (F16, F64, F32)], ids=str)


def lists(sets: int, dtypes: Sequence[torch.dtype], *, shift: int = 0) -> list[Tensor]:
    """Set by set; with `shift`, tensors that begin so many elements behind a multiple of 16 bytes."""
    tensors = []
    for k in range(sets):
        for i, shape in enumerate(SHAPES):
            x = randn(*shape, dtype=dtypes[(k + i) % len(dtypes)], seed=10 * k + i)
            memory = x.new_zeros(x.numel() + shift)
            memory[shift:] = x.flatten()
            tensors.append(memory[shift:].view(shape))
    return tensors


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in float64."""
    return [x.double() for x in tensors]

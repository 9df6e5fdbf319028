"""Rows as they lie in a store: floats as they are, or integers with a scale for every block of columns."""

import math
from collections.abc import Callable
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import FLOATS, Backend, select
from unlearn_kernels.reference import influence_rows as reference
from unlearn_kernels.reference.influence import integers

Format = Literal["float32", "bfloat16", "int8", "int4"]
FORMATS: Final = ("float32", "bfloat16", "int8", "int4")
_BITS: Final = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_TYPES: Final = {32: torch.float32, 16: torch.bfloat16}
QUERY_LEVELS: Final = 8191


class Coded(NamedTuple):
    """Rows (n, bytes) uint8 or (n, D) floating-point, and scales (n, blocks) float32, of no column for floats."""

    rows: Tensor
    scales: Tensor


def is_coded(name: str) -> bool:
    """Whether rows of this format are integers."""
    return _BITS[name] in reference.LEVELS


def row_bytes(name: str, width: int) -> int:
    """Bytes of one row, without scales."""
    return (_BITS[name] * width + 7) // 8


def blocks(name: str, width: int, block: int) -> int:
    """Scales of one row."""
    return -(-width // block) if is_coded(name) else 0


def _fake(
    x: Tensor, bits: int, block: int, unbiased: bool, seed: int, first: int
) -> tuple[Tensor, Tensor, Tensor]:
    n, width = x.shape
    columns = {0: 0, 4: (width + 1) // 2}.get(bits, width)
    count = (width + block - 1) // block if bits in reference.LEVELS else 0
    return (
        x.new_empty((n, columns), dtype=_TYPES.get(bits, torch.uint8)),
        x.new_empty((n, count), dtype=torch.float32),
        x.new_empty((n,), dtype=torch.float64),
    )


_ops.register_operator(
    "encode_rows",
    "influence",
    "codes, scales of blocks and squared norms of rows, in one pass",
    reference=reference.encode_rows,
    fake=_fake,
    triton=_ops.launcher("influence_rows", "encode_rows"),
)


def _kernel(x: Tensor, backend: Backend | None) -> tuple[Callable[..., Any], Tensor]:
    here = x if x.device.type in ("cpu", "cuda") else x.cpu()
    made = here if here.dtype in FLOATS else here.float()
    return select("encode_rows", backend, (made,)), made


def encode(
    x: Tensor, name: str, block: int, first: int | None = None, backend: Backend | None = None
) -> tuple[Coded, Tensor]:
    """Rows (n, D) in a format, and their squared norms (n,) float64, on the CPU.

    `int8` is a byte of `trunc(x * (1 / s) + (128 + u))`, each step in float32, s the greatest magnitude of the block
    over 127; `int4` a nibble of `trunc(x * (1 / s) + (8 + u))`, s over 7, even columns in the low half of a byte. A
    block of zeros, or whose s is subnormal, has scale 0. u is one half, or with `first` the random number of rows
    first, first + 1, ...: right on average.

    Raises:
        ValueError: if a row that is to be an integer is not finite.
    """
    call, made = _kernel(x, backend)
    same = made.dtype == _TYPES.get(_BITS[name])
    rows, scales, sqnorms = call(made, 0 if same else _BITS[name], block, first is not None, 0, first or 0)
    if math.isnan(float(scales.sum())):  # finite ones may add up to infinity
        raise ValueError(f"rows must be finite to be stored as {name}")
    return Coded((made if same else rows).cpu(), scales.cpu()), sqnorms.cpu()


def decode(coded: Coded, name: str, width: int, block: int) -> Tensor:
    """What `encode` has made of rows, (n, D) float32."""
    if not is_coded(name):
        return coded.rows.float()
    values = integers(coded.rows, name == "int4", width).float()
    return values * coded.scales.repeat_interleave(block, dim=1)[:, :width]


def squared_norms(x: Tensor, backend: Backend | None = None) -> Tensor:
    """Of the rows (n, D), (n,) float64."""
    call, made = _kernel(x.detach(), backend)
    sqnorms: Tensor = call(made, 0, 2, False, 0, 0)[2]
    return sqnorms


def query_codes(queries: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (Q, D) as int16 of at most 8191 and a scale each: 14 bits, so that rows alone set the error."""
    wide = queries.float()
    # Not by a number, whose reciprocal CUDA multiplies by: the codes are the same on every device.
    levels = wide.new_full((), QUERY_LEVELS)
    scales = wide.abs().amax(1) / levels if wide.shape[1] else wide.new_zeros(len(wide))
    ratio = torch.where(scales[:, None] > 0, wide / scales[:, None], 0.0)
    return ratio.round().to(torch.int16).contiguous(), scales.contiguous()

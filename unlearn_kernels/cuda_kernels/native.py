"""The way into the CUDA extension: addresses and numbers, which the launchers have checked."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels.triton_kernels.surgery.tables import CODES, Table

ANY = -1  # element types to be looked up


def launch(kernel: str, arguments: Sequence[int], device: torch.device) -> None:
    """Runs one entry of csrc/cuda on the device's current stream."""
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        getattr(torch.ops.unlearn_kernels_cuda, kernel)(list(arguments), stream)


def run(kernel: str, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Runs an entry with tensors by their addresses; None is address 0.

    Tensors must be contiguous. They may be freed at once: the allocator gives memory to later work of the same stream.
    """
    numbers = [x.data_ptr() if isinstance(x, Tensor) else int(x or 0) for x in arguments]
    launch(kernel, numbers, device)


def lists_of(table: Table) -> tuple[Tensor | int, ...]:
    """What every entry over lists takes first."""
    return *table.tensors(), table.addresses.shape[1], table.tasks, int(table.aligned)


def code_of(table: Table) -> int:
    """The one element type of all lists, or ANY."""
    return next((code for code in CODES.values() if table.types == 1 << code), ANY)

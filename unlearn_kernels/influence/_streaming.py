"""Rows in the host's memory, brought to a device a block at a time while it works on the block before."""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

_BLOCK_BYTES: Final = 1 << 25
_AHEAD: Final = 2  # blocks that the host may be ahead of the device

Block = tuple[int, list[Tensor]]


def blocks_on(parts: Sequence[Tensor], device: torch.device, kept: Tensor | None = None) -> Iterator[Block]:
    """Yield the first row and the rows of each part, (n, ...), on the device; the CPU takes all at once.

    With `kept`, those rows alone, counted without the others; on the CPU they are copied, in blocks of at most 32 MB.

    What is done with a block goes to the device's current stream; the block may be dropped as soon as it is enqueued.

    Scratch: three blocks of at most 32 MB (one row, where that is more) on the device, as many of pinned memory.
    """
    if device.type == "cpu":
        yield from [(0, list(parts))] if kept is None else _taken(parts, kept)
        return
    yield from _sent(parts, device, kept)


def _taken(parts: Sequence[Tensor], kept: Tensor | None) -> Iterator[Block]:
    size = max(1, _BLOCK_BYTES // max(1, sum(part[:1].nbytes for part in parts)))
    for first in range(0, len(parts[0] if kept is None else kept), size):
        some = slice(first, first + size) if kept is None else kept[first : first + size]
        yield first, [part[some] for part in parts]


def _sent(parts: Sequence[Tensor], device: torch.device, kept: Tensor | None) -> Iterator[Block]:
    copies, work = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    begun: deque[torch.cuda.Event] = deque()
    for first, rows in _taken(parts, kept):
        if len(begun) == _AHEAD:
            begun.popleft().synchronize()
        with torch.cuda.stream(copies):
            block = [_pinned(part).to(device, non_blocking=True) for part in rows]
        work.wait_stream(copies)
        for x in block:
            x.record_stream(work)
        yield first, block
        begun.append(work.record_event())


def _pinned(x: Tensor) -> Tensor:
    """A copy that a device can read by itself; torch keeps the memory until the transfer is over."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)

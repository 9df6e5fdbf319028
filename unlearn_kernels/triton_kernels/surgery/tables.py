"""Lists of tensors as the kernels see them: addresses, element types, and the chunks that programs work on."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops

CHUNK: Final = 16384
# Element types by the code that stands for them in the table; the kernels' flags have one bit for each.
CODES: Final = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
GLOBAL, GROUP, TENSOR, ROW, ELEMENT = range(5)
_VECTOR: Final = 16  # bytes of the widest load, and elements that a vectorised mask must not cut


class Table(NamedTuple):
    """Lists of tensors on their device. Chunks of one segment are adjacent."""

    addresses: Tensor  # (lists, positions) int64
    codes: Tensor  # (lists, positions) int32
    positions: Tensor  # (tasks,) int32
    starts: Tensor  # (tasks,) int64
    stops: Tensor  # (tasks,) int64
    segments: Tensor  # (tasks,) int32
    firsts: Tensor  # (segments + 1,) int64: the first task of each segment
    types: int
    single: bool  # every element type is narrower than float64
    aligned: bool  # addresses, starts and stops are multiples of 16: whole vectors can be loaded
    memory: Sequence[Sequence[Tensor]]  # what the addresses point to, kept alive

    @property
    def lists(self) -> int:
        """How many."""
        return self.addresses.shape[0]

    @property
    def tasks(self) -> int:
        """How many chunks."""
        return self.positions.shape[0]

    @property
    def sums(self) -> int:
        """How many segments."""
        return self.firsts.shape[0] - 1

    def tensors(self) -> tuple[Tensor, ...]:
        """What every kernel takes first."""
        return self.addresses, self.codes, self.positions, self.starts, self.stops, self.segments


class _Chunks(NamedTuple):
    positions: Tensor
    starts: Tensor
    stops: Tensor
    segments: Tensor
    firsts: Tensor


def moved(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on the device; the host does not wait for the copy."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def addresses_of(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Where tensors lie, int64."""
    return moved([x.data_ptr() for x in tensors], torch.int64, device)


def _repeated(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For counts (2, 3): which entry each of 5 belongs to, (0, 0, 1, 1, 1), and its place there, (0, 1, 0, 1, 2)."""
    owner = torch.repeat_interleave(torch.arange(len(counts)), counts)
    first = torch.cumsum(counts, 0) - counts
    return owner, torch.arange(len(owner)) - first[owner]


def _chunks(tensors: Sequence[Tensor], scope: int, groups: Sequence[int]) -> _Chunks:
    """The chunks of one list: its rows, or its tensors whole, cut into pieces of at most CHUNK elements."""
    sizes = torch.tensor([x.numel() for x in tensors])
    pieces = torch.tensor([x.shape[0] if scope == ROW and x.dim() > 1 else 1 for x in tensors])
    position, place = _repeated(pieces)
    length = (sizes // pieces.clamp(min=1))[position]
    piece, part = _repeated((length + CHUNK - 1) // CHUNK)
    begin = (place * length)[piece]
    starts = begin + part * CHUNK
    stops = torch.minimum(starts + CHUNK, begin + length[piece])
    of = {GLOBAL: torch.zeros_like(position), GROUP: torch.tensor(groups)[position] if groups else position}
    segment = of.get(scope, torch.arange(len(position)))[piece]
    order = torch.argsort(segment, stable=True)
    count = {GLOBAL: 1, GROUP: max(groups, default=0) + 1}.get(scope, len(position))
    firsts = torch.searchsorted(segment[order].contiguous(), torch.arange(count + 1))
    return _Chunks(position[piece][order], starts[order], stops[order], segment[order], firsts)


def table_of(lists: Sequence[Sequence[Tensor]], scope: int = GLOBAL, groups: Sequence[int] = ()) -> Table:
    """The table of lists whose tensors are dense in one order at each position; rows need that of the indices."""
    device = lists[0][0].device
    chunks = _chunks(lists[0], scope, groups)
    codes = [[CODES[x.dtype] for x in tensors] for tensors in lists]
    types = {code for row in codes for code in row}
    addresses = torch.tensor([[x.data_ptr() for x in tensors] for tensors in lists])
    aligned = all(not (x % _VECTOR).any() for x in (addresses, chunks.starts, chunks.stops))

    def there(x: Tensor, dtype: torch.dtype = torch.int64) -> Tensor:
        return x.to(device, dtype, non_blocking=True)

    return Table(
        there(addresses),
        there(torch.tensor(codes), torch.int32),
        there(chunks.positions, torch.int32),
        there(chunks.starts),
        there(chunks.stops),
        there(chunks.segments, torch.int32),
        there(chunks.firsts),
        types=sum(1 << code for code in types),
        single=CODES[torch.float64] not in types,
        aligned=aligned,
        memory=lists,
    )


def _dense_together(tensors: Sequence[Tensor], indexed: bool) -> bool:
    first = tensors[0]
    if all(x.is_contiguous() for x in tensors):
        return True
    if indexed:
        return False
    return all(x.stride() == first.stride() for x in tensors) and torch.ops.aten.is_non_overlapping_and_dense(
        first
    )


def made_dense(lists: Sequence[Sequence[Tensor]], *, indexed: bool = False) -> list[list[Tensor]]:
    """The lists with contiguous copies where the tensors at a position differ in their order.

    `indexed`: also where that is not the order of the indices.
    """
    places = [
        list(xs) if _dense_together(xs, indexed) else [x.contiguous() for x in xs]
        for xs in zip(*lists, strict=True)
    ]
    return [list(tensors) for tensors in zip(*places, strict=True)]


def copy_back(to: Sequence[Tensor], made: Sequence[Tensor]) -> None:
    """Writes what was made of copies to where they came from."""
    for x, y in zip(to, made, strict=True):
        if x.data_ptr() != y.data_ptr():
            x.copy_(y)


def refuse_overlap(out: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Raises RuntimeError where writing to `out` would reach other memory."""
    if _ops.raw("find_clash")(list(out), list(tensors))[0] >= 0:
        raise RuntimeError("a tensor that is written overlaps in memory with another one")

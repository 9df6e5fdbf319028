"""The time of each path of `dots`, in multiply-adds of the product core at its full rate.

A path packs panels and multiplies them. Packing an element costs as much as several multiply-adds, more where rows
become columns on the way, and multiplying two tiles in cache costs more than the same in registers. The constants
are least squares over measured times (`python docs/per_sample_costs.py`, which draws the model beside them).
"""

from typing import Final, NamedTuple

COPIED: Final = 20.0
TRANSPOSED: Final = 20.0
HADAMARD: Final = 8.0
_HELD: Final = 16
_HELD_SIZE: Final = 160 << 10


class Sizes(NamedTuple):
    """A dot product's two sides of `samples` with `tokens` each, and the layer's features."""

    samples1: int
    tokens1: int
    samples2: int
    tokens2: int
    inputs: int
    outputs: int
    summed: bool


class Work(NamedTuple):
    """What a path does: multiply-adds, elements packed as they lie or transposed, products of tiles in cache."""

    products: float
    copied: float
    transposed: float
    hadamard: float

    @property
    def cost(self) -> float:
        """In multiply-adds."""
        return self.products + COPIED * self.copied + TRANSPOSED * self.transposed + HADAMARD * self.hadamard


def _tiles(size: int, most: int) -> int:
    return max(-(-size // most), 1)


def tokens(s: Sizes) -> Work:
    """Tiles of `A A'^T` and of `G G'^T`; their rows are read where they lie."""
    rows, cols, features = s.samples1 * s.tokens1, s.samples2 * s.tokens2, s.inputs + s.outputs
    packed = features * _tiles(rows, 192) * cols
    return Work(_padded(rows, 6) * _padded(cols, 16) * features, 0, packed, rows * cols)


def direct(s: Sizes) -> Work:
    """Tiles of the gradients of both sides; those of the smaller side are held, some samples at a time."""
    small, large = (s.samples1, s.tokens1), (s.samples2, s.tokens2)
    if small[0] > large[0]:
        small, large = large, small
    if s.summed:
        held, groups = 1, 1
        formed = s.samples2 * s.tokens2 + s.samples1 * s.tokens1
        pairs = s.samples1
    else:
        held, groups = min(small[0], _HELD), -(-small[0] // _HELD)
        formed = small[0] * small[1] + groups * large[0] * large[1]
        pairs = small[0] * large[0]
    rows = 96 if held > 4 else 192
    cols = min(max(_HELD_SIZE // max(held * rows, 1) // 16 * 16, 16), 192)
    if held == 1 and _tiles(s.outputs, 384) * _tiles(s.inputs, 256) >= 6:
        rows, cols = 384, 256
    packed = formed * (s.outputs * _tiles(s.inputs, cols) + s.inputs * _tiles(s.outputs, rows))
    area = _padded(s.outputs, 6) * _padded(s.inputs, 16)
    return Work(formed * area, packed, 0, pairs * s.inputs * s.outputs)


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to

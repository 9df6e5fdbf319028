"""Measures tiles on the GPU at hand: `python -m benchmarks.tune [--write]`.

For each element type, and for programs with one accumulator and two, the candidates race on a product of a model's
size; `--write` keeps the best in unlearn_kernels/triton_kernels/configs/<device>.json, which launchers then read.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import torch
import triton

from unlearn_kernels.testing import randn
from unlearn_kernels.triton_kernels import configs

DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Tile = tuple[int, int, int, int, int]


def candidates(dot: str) -> Iterator[Tile]:
    """(rows, cols, depth, warps, stages), no taller than wide: kernels of square blocks take the rows."""
    half = dot != "fp32"
    sizes, depths = ((64, 128, 256), (32, 64)) if half else ((32, 64, 128), (16, 32))
    for rows, cols, depth in itertools.product(sizes, sizes, depths):
        if rows <= cols and rows * cols <= (128 * 256 if half else 64 * 128):
            for warps, stages in itertools.product((4, 8), (2, 3, 4) if half else (2,)):
                yield rows, cols, depth, warps, stages


def best(dot: str, accumulators: int, seconds: Callable[[], float]) -> tuple[Tile, float]:
    """The fastest candidate by `seconds()`; one that does not compile or fit is passed over."""
    found: list[tuple[float, Tile]] = []
    for tile in candidates(dot):
        with configs.trial({configs.key(dot, accumulators): tile}):
            try:
                found.append((seconds(), tile))
            except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                print(f"{dot} {tile}: {type(error).__name__}", file=sys.stderr)
    if not found:
        raise RuntimeError(f"no tile of {dot} could be run")
    time, tile = min(found)
    return tile, time


def calls(dtype: torch.dtype) -> dict[int, Callable[[], object]]:
    """What is timed, by the number of accumulators: norms and squared sums of a 4096-wide layer's gradients."""
    from unlearn_kernels.influence import squared_gradients
    from unlearn_kernels.per_sample import linear

    a, g = (randn(8, 512, 4096, dtype=dtype, seed=seed, device="cuda") for seed in (0, 1))
    return {1: lambda: linear.sqnorms(a, g, method="direct"), 2: lambda: squared_gradients(a, g)}


def tune() -> dict[str, Tile]:
    """The best tile of every case on this device."""
    tiles: dict[str, Tile] = {}
    for dot, dtype in DTYPES.items():
        for accumulators, call in calls(dtype).items():

            def seconds(call: Callable[[], object] = call) -> float:
                return float(triton.testing.do_bench(call, return_mode="median")) / 1e3

            name = configs.key(dot, accumulators)
            tiles[name], time = best(dot, accumulators, seconds)
            print(f"{name}: {tiles[name]} {time * 1e3:.2f} ms", flush=True)
    return tiles


def write(device: str, tiles: Mapping[str, Tile]) -> None:
    """Keeps them as the device's file."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    content = {"device": device, **versions, "tiles": {name: list(tile) for name, tile in tiles.items()}}
    path = configs.file_of(device)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    name = configs.device_name()
    if name is None:
        sys.exit("benchmarks.tune: torch finds no CUDA device")
    measured = tune()
    if sys.argv[1:] == ["--write"]:
        write(name, measured)

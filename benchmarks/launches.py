"""What the Triton launchers compile for the operators' samples and the small benchmark cases, with no GPU present.

    python -m benchmarks.launches [PATTERN ...] [--capability 90]

Compiles every launch and prints what each takes; the status is 1 where one does not compile or does not fit. On a
machine with a GPU this also fills Triton's cache, on all cores at once.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor

import torch

from benchmarks import registry
from unlearn_kernels._backends import FLOATS, REGISTRY
from unlearn_kernels._samples import SAMPLES, results
from unlearn_kernels.triton_kernels import aot
from unlearn_kernels.triton_kernels.dry_run import Launch, launches

# Whole models run the operators of the other cases; the product core has no GPU side; a store looks up what it found.
_NOT_KERNELS = ("per_sample.model", "tile_engine", "influence.GradientStore")


def of_samples(capability: int) -> dict[str, Launch]:
    """The launches of every operator's sample in every type, forward and backward."""
    found: dict[str, Launch] = {}
    for name, make in SAMPLES.items():
        operator = REGISTRY[name]
        for dtype in FLOATS:
            with launches(capability) as made:
                arguments = make(dtype, "cpu")
                results(operator.impls["cpp"].call, arguments, differentiable=operator.differentiable)
            found |= made
    return found


def of_cases(patterns: Sequence[str], capability: int) -> dict[str, Launch]:
    """The launches of our providers in each small case."""
    found: dict[str, Launch] = {}
    for case in registry.select(patterns):
        if case.name.startswith(_NOT_KERNELS) or "small" not in case.name:
            continue
        inputs = case.make("cpu")
        for provider in (p for p in case.providers if p.role == "ours"):
            with launches(capability) as made:
                call = provider.build(inputs)
                for step in (call.reset, call.run):
                    if step is not None:
                        step()
            found |= made
    return found


def compiled(found: Iterable[Launch], capability: int) -> Iterator[tuple[Launch, Callable[[], aot.Compiled]]]:
    """Each launch and how to wait for what it compiled to; all are begun at once.

    In processes, because LLVM ends the one in which it fails.
    """
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        begun: list[tuple[Launch, Future[aot.Compiled]]] = [
            (launch, pool.submit(launch.compile_for, capability)) for launch in found
        ]
        for launch, future in begun:
            yield launch, future.result


def problem(result: aot.Compiled, capability: int) -> str | None:
    """Why a compiled kernel would not run, or None."""
    if result.shared_bytes > aot.SHARED_LIMITS[capability]:
        return f"takes {result.shared_bytes} B of shared memory, a block has {aot.SHARED_LIMITS[capability]}"
    return None


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.launches", description=__doc__)
    parser.add_argument(
        "pattern", nargs="*", metavar="PATTERN", help="of the small cases; all if there is none"
    )
    parser.add_argument("--capability", type=int, choices=sorted(aot.SHARED_LIMITS), default=_here())
    return parser.parse_args(arguments)


def _here() -> int:
    """The compute capability of this machine's GPU, or Hopper's."""
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return max((c for c in aot.SHARED_LIMITS if c <= 10 * major + minor), default=min(aot.SHARED_LIMITS))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parsed = _parsed(arguments)
    capability = parsed.capability
    found = of_samples(capability) | of_cases(parsed.pattern, capability)
    failed = 0
    for launch, wait in compiled(found.values(), capability):
        try:
            result = wait()
            outcome, text = problem(result, capability), f"{result}"
        except Exception as error:
            outcome, text = f"{type(error).__name__}: {error}", ""
        failed += outcome is not None
        print(f"{launch.kernel:24} {outcome or text}")
    print(f"{len(found)} launches for sm_{capability}, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""The job's runs, each in a process of its own, so that time and peak memory are its own.

The parent hands out one piece of work at a time, to one worker after the other: they never run side by side.
"""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from unlearn_kernels import use_backend

from . import attribution
from .memory import PeakMeter
from .operators import Kernels, Plain, Projection
from .preparation import load
from .training import nll_per_token
from .unlearning import Recipe, Step, Unlearner

Backend = Literal["reference", "cpp", "triton", "cuda"]


@dataclass(frozen=True)
class Setup:
    """All that a worker needs to start."""

    kernels: bool
    trained: Path  # written by `preparation`
    projected: int  # coordinates of a projected gradient
    recipe: Recipe
    seed: int = 0
    device: str = "cpu"
    backend: Backend | None = None
    dtype: torch.dtype = torch.float32


class Run:
    """The state of one run, and the work that it can be asked for. Texts are named by their index."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.operators = Kernels() if setup.kernels else Plain()
        trained = load(setup.trained)
        self.sequences = trained.sequences
        self.model = trained.model().to(setup.device, setup.dtype).requires_grad_(False)
        self.meter = PeakMeter(setup.device)
        self.projection: Projection | None = None
        self.rows = torch.empty(0)  # projected gradients, by place
        self._warm_up()

    def _warm_up(self) -> None:
        """Do a little of everything on a copy, so that loading code is in neither time nor memory."""
        model, texts = copy.deepcopy(self.model), self.sequences[:4]
        weight = attribution.target(model).weight.requires_grad_(True)
        projection = self.operators.projection(weight.numel(), 4, self.setup.seed, weight)
        rows = attribution.gradient_rows(model, self.operators, projection, texts)
        attribution.search(self.operators, rows, 1, 2)
        unlearner = Unlearner(model, self.operators, self.setup.recipe)
        unlearner.step(texts, unlearner.reference(texts), texts)

    def begin_influence(self, texts: int) -> None:
        """Make room for the rows of so many texts."""
        self.meter.start()
        weight = attribution.target(self.model).weight.requires_grad_(True)
        k = self.setup.projected
        self.projection = self.operators.projection(weight.numel(), k, self.setup.seed, weight)
        self.rows = weight.new_zeros(texts, k)

    def gradients(self, texts: Sequence[int], places: Sequence[int]) -> None:
        """Rows for `texts`, stored at `places`."""
        assert self.projection is not None, "begin_influence comes first"
        self.rows[list(places)] = attribution.gradient_rows(
            self.model, self.operators, self.projection, self._texts(texts)
        )

    def search(self, queries: int, k: int) -> list[int]:
        """Places of the `k` training texts behind the queries, whose rows are the last."""
        return attribution.search(self.operators, self.rows, queries, k).tolist()

    def begin_unlearning(self) -> None:
        self.projection, self.rows = None, torch.empty(0)
        self.meter.start()
        self.unlearner = Unlearner(self.model, self.operators, self.setup.recipe)
        self.references: dict[int, Tensor] = {}

    def reference(self, texts: Sequence[int]) -> None:
        self.references = dict(zip(texts, self.unlearner.reference(self._texts(texts)), strict=True))

    def step(self, forget: Sequence[int], retain: Sequence[int]) -> Step:
        reference = torch.stack([self.references[i] for i in forget])
        return self.unlearner.step(self._texts(forget), reference, self._texts(retain))

    def peak(self) -> int:
        """Most bytes held at once since the phase began, beyond those held when it did."""
        return self.meter.extra()

    def nll(self, texts: Sequence[int]) -> float:
        """Mean per token, in plain PyTorch; neither its time nor its memory is counted."""
        with self.meter.paused():
            return nll_per_token(self.model, self._texts(texts))

    def weights(self) -> list[float]:
        return self.model.flat_weights().tolist()

    def _texts(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.sequences[i] for i in indices]


def backend(name: Backend | None) -> AbstractContextManager[Any]:
    """The kernels' backend while the context lasts; None leaves it to the device."""
    return use_backend(name) if name else nullcontext()


def serve(connection: Connection, setup: Setup) -> None:
    """Answer `(method, arguments)` with `(value, seconds)`, or an error's text, until told `None`."""
    try:
        with backend(setup.backend):
            run = Run(setup)
            connection.send((None, 0.0))
            while (request := connection.recv()) is not None:
                method, arguments = request
                begun = time.perf_counter()
                value = getattr(run, method)(*arguments)
                if torch.device(setup.device).type == "cuda":
                    torch.cuda.synchronize()
                connection.send((value, time.perf_counter() - begun))
    except Exception:  # whatever it is, the parent shows it and stops
        connection.send(traceback.format_exc())


class Worker:
    """A run in a process of its own. `worker.call("step", ...)` waits for the answer."""

    def __init__(self, setup: Setup) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False

    def call(self, method: str, *arguments: Any) -> tuple[Any, float]:
        """The value of a method of `Run` and the seconds that it took."""
        self.wait()
        self.connection.send((method, arguments))
        return self._answer()

    def wait(self) -> None:
        """Until it has loaded its model."""
        if not self.ready:
            self._answer()
            self.ready = True

    def close(self) -> None:
        if self.process.is_alive():
            self.wait()
            self.connection.send(None)
        self.process.join()

    def _answer(self) -> tuple[Any, float]:
        try:
            answer = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"a worker ended with exit code {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"a worker failed:\n{answer}")
        return answer

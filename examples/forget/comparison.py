"""The job, done by several workers in turn: influence first, then the same unlearning steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from .corpus import Split
from .progress import bar
from .training import Progress, batches_by_length, random_batches
from .unlearning import Step
from .worker import Setup, Worker

TEXTS_FOR_PRECISION = 50
TEXTS_FOR_RETAIN_NLL = 400


@dataclass(frozen=True)
class Plan:
    """Which texts, in which order, in how many steps."""

    split: Split
    lengths: list[int]
    steps: int
    found: int  # texts to take from influence, and forget
    yardstick: int  # steps that are done in float64 as well
    index_tokens: int = 2048
    index_texts: int = 64  # at once, whose gradients are in memory
    forget_texts: int = 16
    retain_tokens: int = 2048
    measure_every: int = 10
    seed: int = 0


@dataclass
class Outcome:
    """All that was seen of one worker's run."""

    found: list[int] = field(default_factory=list)  # texts behind the queries, best first
    nll: dict[str, dict[str, float]] = field(default_factory=dict)  # "before" and "after", per set of texts
    steps: list[Step] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)  # held-out likelihoods while unlearning
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # per phase
    extra_bytes: dict[str, int] = field(default_factory=dict)  # peak per phase
    weights: dict[int, torch.Tensor] = field(default_factory=dict)  # after so many steps


class Comparison:
    """Runs a plan on named workers, taking turns at who goes first."""

    def __init__(self, workers: dict[str, Worker], plan: Plan) -> None:
        self.workers, self.plan = workers, plan
        self.outcomes = {name: Outcome() for name in workers}
        self.turn = 0
        self.measured = asdict(plan.split)
        self.measured["retain"] = plan.split.retain[:: max(1, len(plan.split.retain) // TEXTS_FOR_RETAIN_NLL)]

    def measure_before(self) -> None:
        """By one worker for all: they hold the same model, and measure it with the same code."""
        first = next(iter(self.workers))
        with bar("likelihoods before") as progress:
            seen = self._likelihoods(first, progress, 0, len(self.measured))
        for outcome in self.outcomes.values():
            outcome.nll["before"] = seen

    def measure_after(self) -> None:
        total = len(self.workers) * len(self.measured)
        with bar("likelihoods after") as progress:
            for place, (name, outcome) in enumerate(self.outcomes.items()):
                outcome.nll["after"] = self._likelihoods(name, progress, place * len(self.measured), total)

    def _likelihoods(self, name: str, progress: Progress, done: int, total: int) -> dict[str, float]:
        seen = {}
        for texts in self.measured:
            seen[texts] = self._nll(name, texts)
            progress(done + len(seen), total, "")
        return seen

    def _nll(self, name: str, texts: str) -> float:
        return self.workers[name].call("nll", self.measured[texts])[0]

    def _trace(self, step: int) -> None:
        """A point of each held-out curve, between the first and the last, which are measured anyway."""
        for name, outcome in self.outcomes.items():
            nll = {texts: self._nll(name, texts) for texts in ("queries", "validation")}
            outcome.curve.append({"step": step, **nll})

    def find(self) -> list[int]:
        """Influence. Returns the texts to forget: those that the first worker found."""
        split = self.plan.split
        texts = split.train + split.queries
        batches = batches_by_length(
            [self.plan.lengths[i] for i in texts], self.plan.index_tokens, most=self.plan.index_texts
        )
        self._each("begin_influence", len(texts))
        with bar("influence") as progress:
            for done, places in enumerate(batches, 1):
                self._each("gradients", [texts[place] for place in places], places, phase="influence")
                progress(done, len(batches), "")
        found = self._each(
            "search", len(split.queries), max(self.plan.found, TEXTS_FOR_PRECISION), phase="influence"
        )
        self._peaks("influence")
        for name, places in found.items():
            self.outcomes[name].found = [texts[place] for place in places]
        return next(iter(self.outcomes.values())).found[: self.plan.found]

    def forget(self, texts: Sequence[int], steps: int, title: str = "unlearning") -> None:
        """Unlearning steps on `texts`, with all other training texts to be retained."""
        chosen = set(texts)
        kept = [i for i in self.plan.split.train if i not in chosen]
        forget = self._schedule(sorted(chosen), self.plan.seed + 1)
        retain = self._schedule(kept, self.plan.seed + 2, by_length=True)
        self._each("begin_unlearning")
        self._each("reference", sorted(chosen), phase="unlearning")
        with bar(title) as progress:
            for step in range(steps):
                for name, seen in self._each("step", forget[step], retain[step], phase="unlearning").items():
                    self.outcomes[name].steps.append(seen)
                if (step + 1) % self.plan.measure_every == 0 and step + 1 < steps:
                    self._trace(step + 1)
                if step + 1 in (self.plan.yardstick, steps):
                    for name, weights in self._each("weights").items():
                        self.outcomes[name].weights[step + 1] = torch.tensor(weights, dtype=torch.float64)
                progress(step + 1, steps, "")
        self._peaks("unlearning")

    def _schedule(self, texts: Sequence[int], seed: int, by_length: bool = False) -> list[list[int]]:
        """A batch for each step, from as many passes over `texts` as it takes."""
        plan, generator = self.plan, torch.Generator().manual_seed(seed)
        schedule: list[list[int]] = []
        while len(schedule) < plan.steps:
            if by_length:
                batches = batches_by_length([plan.lengths[i] for i in texts], plan.retain_tokens, generator)
            else:
                batches = random_batches(len(texts), plan.forget_texts, generator)
            schedule += [[texts[place] for place in batch] for batch in batches]
        return schedule

    def _each(self, method: str, *arguments: Any, phase: str | None = None) -> dict[str, Any]:
        """Call a method of every worker, one after the other; who is first changes from call to call."""
        self.turn += 1
        names = list(self.workers)
        names = names[self.turn % len(names) :] + names[: self.turn % len(names)]
        answers = {}
        for name in names:
            answers[name], seconds = self.workers[name].call(method, *arguments)
            if phase is not None:
                self.outcomes[name].seconds[phase] += seconds
        return answers

    def _peaks(self, phase: str) -> None:
        for name, peak in self._each("peak").items():
            self.outcomes[name].extra_bytes[phase] = peak


def compare(setup: Setup, plan: Plan) -> tuple[dict[str, Outcome], list[int]]:
    """The job with the kernels and without, and its first steps in float64; and the texts forgotten."""
    workers = {"kernels": Worker(setup), "plain": Worker(replace(setup, kernels=False))}
    comparison = Comparison(workers, plan)
    comparison.measure_before()
    texts = comparison.find()
    comparison.forget(texts, plan.steps)
    comparison.measure_after()
    for worker in workers.values():
        worker.close()

    exact = Worker(replace(setup, kernels=False, dtype=torch.float64))
    yardstick = Comparison({"float64": exact}, replace(plan, measure_every=plan.steps + 1))
    yardstick.forget(texts, plan.yardstick, "unlearning in float64")
    exact.close()
    return comparison.outcomes | yardstick.outcomes, texts

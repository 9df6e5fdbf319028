"""A training step of several objectives, each with a gradient of its own."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from unlearn_kernels._backends import Backend
from unlearn_kernels.surgery import _sharding
from unlearn_kernels.surgery._averages import Averages
from unlearn_kernels.surgery._conflict_rules import RULES as CONFLICTS
from unlearn_kernels.surgery._conflict_rules import ConflictScope
from unlearn_kernels.surgery._in_place import InPlace, any_rule
from unlearn_kernels.surgery._lists import SCOPES, check_choice
from unlearn_kernels.surgery._step import (
    By,
    Gradients,
    Step,
    clipped,
    combined,
    listed,
    matched,
    owned,
    step_if,
)
from unlearn_kernels.surgery.conflict import project_conflict_
from unlearn_kernels.surgery.gramian import gramian
from unlearn_kernels.surgery.rules import Rule


class GradientSurgery:
    """Collects a gradient for every objective, and steps with what a rule makes of them.

        surgery = GradientSurgery(model.parameters(), "agem")
        for forget_batch, retain_batch in batches:
            with surgery.objective("forget"):
                forget_loss(model, forget_batch).backward()
            with surgery.objective("retain"):
                retain_loss(model, retain_batch).backward()
            surgery.step(optimizer)

    Inside `objective` the parameters' `.grad` are those of that objective: several `backward()` calls add up, and
    no graph is retained. Gradients change hands by reference and are never copied; the combined one is written over
    the first objective's. A parameter without a gradient of an objective counts as zero there; rules that protect one
    objective by changing the other (`agem`, `gru`) leave out a parameter that the first has no gradient of.

    Gradients may be `DTensor`s (FSDP2, tensor parallel): one all-reduce of K (K + 1) / 2 numbers makes the Gramian of
    the whole gradient, and all processes weigh alike. Under `DistributedDataParallel` they are whole already, and
    nothing is sent.

    Args:
        parameters: a module, parameters, or an optimizer's parameter groups; the trainable ones take part.
        rule: a name of `rules.RULES`, a rule, or a name that only `project_conflict_` knows (`gdr_gma`, `doco`, `sago`,
            `graddrop`). Rules of two gradients take the objectives in their order.
        objectives: their names, in the order of the rule's gradients.
        scope: of `gramian`: `global` for one set of weights, `group` for one a parameter group, `tensor`, `row`. By
            default `global`, and for the rules of `project_conflict_` the published one, which may be `element`.
        ema: for an objective, how much of its new gradient enters a moving average that stands for it:
            `r <- (1 - m) r + m r_new`, begun with the first. `{"retain": m}` with the rule `gru` is GRU. Costs a
            gradient's memory, four streams and a host wait, since a step that is not finite must not enter it.
        max_norm: the combined gradient's norm is limited to it, as by `torch.nn.utils.clip_grad_norm_`. Costs nothing:
            the norm is known before the gradient is formed.
        group: the processes that hold parts of the gradients, for plain tensors with Megatron's mark
            `tensor_model_parallel`, or where other processes than these exist. All of them for `DTensor`s.
        backend: see `unlearn_kernels.use_backend`.
        options: of the rule, where it is named.

    Raises:
        ValueError: for no parameters, repeated objectives, a number of them that the rule does not take, an unknown
            rule or scope, or an average of what is no objective or outside (0, 1].
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[Tensor] | Iterable[Mapping[str, Any]],
        rule: str | Rule = "agem",
        *,
        objectives: Sequence[str] = ("forget", "retain"),
        scope: ConflictScope | None = None,
        ema: Mapping[str, float] | None = None,
        max_norm: float | None = None,
        group: dist.ProcessGroup | None = None,
        backend: Backend | None = None,
        **options: Any,
    ) -> None:
        self.parameters, self._groups = listed(parameters)
        self.rule = any_rule(rule, **options)
        self.objectives = tuple(objectives)
        if len(set(self.objectives)) != len(self.objectives) or not self.objectives:
            raise ValueError(f"objectives must be distinct names, got {self.objectives}")
        if self.rule.sets not in (None, len(self.objectives)):
            takes = f"{self.rule.sets} for the rule {self.rule.name!r}"
            raise ValueError(f"objectives must be {takes}, got {self.objectives}")
        self.scope = _scope(self.rule, scope)
        self.max_norm, self.group, self.backend = max_norm, group, backend
        self.averages = Averages(self.objectives, ema or {}, backend)
        self._held: dict[str, Gradients] = {name: self._none() for name in self.objectives}
        self._open: str | None = None

    def _none(self) -> Gradients:
        return [None] * len(self.parameters)

    def _swap(self, gradients: Gradients) -> Gradients:
        before: Gradients = [p.grad for p in self.parameters]
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        return before

    @contextmanager
    def objective(self, name: str) -> Iterator[None]:
        """Inside, `backward()` accumulates into the gradient of this objective.

        Raises:
            ValueError: if there is no such objective.
            RuntimeError: inside another one.
        """
        check_choice("name", name, self.objectives)
        if self._open is not None:
            raise RuntimeError(f"objective {name!r} was entered inside {self._open!r}")
        self._open = name
        outside = self._swap(self._held[name])
        try:
            yield
        finally:
            self._held[name] = [_sharding.settled(owned(g)) for g in self._swap(outside)]
            self._open = None

    def zero_grad(self) -> None:
        """Drops all gradients, those in `.grad` included."""
        self._held = {name: self._none() for name in self.objectives}
        self._swap(self._none())

    @torch.no_grad()
    def apply(self, scaler: GradScaler | None = None) -> Step:
        """Puts the combined gradient into `.grad`, for whoever steps on their own.

        Args:
            scaler: what the losses were scaled with. The combined gradient stays scaled, for its `step`.

        Returns:
            A `Step`; nothing waits for it. Where it is not `finite`, the gradient is not to be used.

        Raises:
            ValueError: if an objective has no gradient at all, or `.grad` has one of no objective.
        """
        self._check_ready()
        scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
        held = [self._held[name] for name in self.objectives]
        # A scaler looks for what is not finite in the result, where A-GEM alone might not leave it.
        found, written = (None if scaler else self._one_call(held)) or self._two_passes(held, scale)
        self._held = {name: self._none() for name in self.objectives}
        self._swap(written)
        return found

    def step(self, optimizer: Optimizer, scaler: GradScaler | None = None) -> Step:
        """Combines, steps unless a gradient is not finite, and drops the gradients.

        Whether to step is the scaler's to say if there is one; its `update` is left to the caller. Without one,
        optimizers that can be told on the device (`fused=True`) are; for others on CUDA the host waits.

        Args:
            optimizer: over these parameters or some of them.
            scaler: as in `apply`.

        Returns:
            As of `apply`.

        Raises:
            ValueError: as of `apply`.
        """
        found = self.apply(scaler)
        if scaler is not None:
            scaler.step(optimizer)
        elif found.gramian.is_cuda and getattr(optimizer, "_step_supports_amp_scaling", False):
            step_if(optimizer, found.finite)
        elif bool(found.finite):
            optimizer.step()
        self.zero_grad()
        return found

    def _check_ready(self) -> None:
        stray = sum(p.grad is not None for p in self.parameters)
        if stray:
            raise ValueError(
                f".grad must be None outside of objectives, got gradients for {stray} parameters"
            )
        for name in self.objectives:
            if name not in self.averages.values and all(g is None for g in self._held[name]):
                raise ValueError(
                    f"objective {name!r} has no gradient: no backward() reached a parameter inside it"
                )

    def _one_call(self, held: Sequence[Gradients]) -> tuple[Step, Gradients] | None:
        """Two gradients in one operator: it writes nothing where nothing conflicts, and looks again while in cache."""
        rule = self.rule.in_one_call() if len(held) == 2 else None
        if (
            rule is None
            or self.averages
            or self.max_norm is not None
            or self._process_group(held) is not None
        ):
            return None
        forget, retain = held
        # It leaves out a parameter without a forget gradient.
        if not self.rule.one_sided and any(f is None and r is not None for f, r in zip(*held, strict=True)):
            return None
        groups = self._groups if self.scope == "group" else None
        found = project_conflict_(
            forget, retain, scope=self.scope, groups=groups, backend=self.backend, **rule
        )
        rates = found.rates if self.scope == "element" else None
        return Step(self.objectives, found.gramian, found.weights, rates), list(forget)

    def _process_group(self, held: Sequence[Gradients]) -> dist.ProcessGroup | None:
        return _sharding.process_group(self.group, [g for tensors in held for g in tensors if g is not None])

    def _two_passes(self, held: Sequence[Gradients], scale: float) -> tuple[Step, Gradients]:
        if isinstance(self.rule, InPlace):
            self.rule.refuse()
        sources, T = self.averages.sources(held, scale)
        leading = sources[:1] if self.rule.one_sided else sources
        places = [i for i in range(len(self.parameters)) if any(s[i] is not None for s in leading)]
        G = self._gramian(sources, places)
        T = T.to(G.device, non_blocking=True)
        G = T @ G @ T.mT
        weights = clipped(self.rule(G), G, self.max_norm)
        if self.averages:
            held = self.averages.moved(held, scale, finite=bool(G.isfinite().all()))
        units = self.averages.units(scale).to(G.device, non_blocking=True)
        keep = [k for k, name in enumerate(self.objectives) if name in self.averages]
        written = combined(held, keep, places, weights * units, self._by(places), self.backend)
        return Step(self.objectives, G, weights), written

    def _by(self, places: Sequence[int]) -> By:
        return self.scope, [self._groups[i] for i in places] if self.scope == "group" else None

    def _gramian(self, sources: Sequence[Gradients], places: Sequence[int]) -> Tensor:
        firsts = [next(g for s in sources if (g := s[i]) is not None) for i in places]
        sets = [matched([s[i] for i in places], firsts) for s in sources]
        group = self._process_group(sources)
        scope, groups = self._by(places)
        if group is None:
            return gramian(sets, scope=scope, groups=groups, backend=self.backend)
        count = dist.get_world_size(group)
        shares = [_sharding.share(self.parameters[i], g, count) for i, g in zip(places, firsts, strict=True)]
        return _sharding.summed(sets, shares, group, scope, groups, self.backend)

    def state_dict(self) -> dict[str, Any]:
        """The rule's memory and the moving averages. Gradients that were not stepped with are not in it."""
        return {"rule": self.rule.state_dict(), "averages": self.averages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another one was.

        Raises:
            ValueError: if its rule or its averages are others.
        """
        self.rule.load_state_dict(state["rule"])
        self.averages.load_state_dict(state["averages"])


def _scope(rule: Rule, scope: str | None) -> Any:
    """The scope, with the rule's own where none is given.

    Raises:
        ValueError: if the rule does not know it.
    """
    known = CONFLICTS[rule.name].scopes if isinstance(rule, InPlace) else tuple(SCOPES)
    check_choice("scope", known[0] if scope is None else scope, known)
    return known[0] if scope is None else scope

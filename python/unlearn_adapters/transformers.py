"""Trainers of transformers: unlearning objectives without logits, and surgery between several losses' gradients.

`UnlearnMixin` gives a Trainer an objective of `unlearn_kernels.token_loss`.

`with_surgery(trainer_class, rule)` makes one of a class that adds a forget and a retain loss up, such as
open-unlearning's; `SurgeryMixin` is for trainers with losses of their own. Accumulation, autocast, scaling, clipping,
stepping and saving stay the Trainer's.
"""

import copy
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from unlearn_adapters._objectives import OBJECTIVES, UnlearnMixin
from unlearn_kernels.surgery import GradientSurgery, Step
from unlearn_kernels.surgery.rules import Rule
from unlearn_kernels.surgery.rules.rule import cosines

__all__ = ["OBJECTIVES", "SurgeryMixin", "UnlearnMixin", "with_surgery"]

T = TypeVar("T", bound=type)


class SurgeryMixin:
    """Comes before a `transformers.Trainer`, and gives every training step several objectives.

        class Forgetter(SurgeryMixin, Trainer):
            surgery_rule = "pcgrad"

    A step is one backward for every objective, each of which ends before the next forward begins: no graph is retained
    and one set of activations is in memory. On a step that updates, the combined gradient is what the Trainer finds in
    `.grad`, clips and steps with. One that is not finite is dropped, so that nothing is updated; with a GradScaler
    the scaler does so.

    What is logged beside the loss, as means since the last log: `cosine_<a>_<b>` between whole gradients,
    `conflict_rate_<a>_<b>`, and `surgery_skipped`, a count. Moving averages and the rule's memory are saved and loaded
    with the Trainer's checkpoints, by every process in a file of its own.

    Attributes:
        surgery_rule: of `GradientSurgery`.
        surgery_objectives: their names, in the order of the rule's gradients.
        surgery_options: further arguments of `GradientSurgery`: `scope`, `ema`, the rule's options.

    Raises:
        ValueError: with the first step, under DeepSpeed, Megatron-LM and FSDP1, whose gradients are out of reach; and
            as `GradientSurgery`.
    """

    surgery_rule: ClassVar[str | Rule] = "agem"
    surgery_objectives: ClassVar[Sequence[str]] = ("forget", "retain")
    surgery_options: ClassVar[Mapping[str, Any]] = {}

    _surgery: GradientSurgery | None = None
    _objective: str | None = None
    _retain: "tuple[tuple[Any, ...], dict[str, Any], Tensor] | None" = None

    @property
    def surgery(self) -> GradientSurgery:
        """The gradients' keeper, made with the optimizer's parameters when it is first asked for."""
        if self._surgery is None:
            _check_reachable(self._trainer.accelerator)
            self._surgery = GradientSurgery(
                self._trainer.optimizer.param_groups,
                copy.deepcopy(self.surgery_rule),
                objectives=self.surgery_objectives,
                **self.surgery_options,
            )
            self._steps: list[_Seen] = []
        return self._surgery

    @property
    def _trainer(self) -> Any:
        return self

    @property
    def _base(self) -> Any:
        return super()

    def objective_loss(self, name: str, model: nn.Module, inputs: Any, **kwargs: Any) -> Tensor:
        """The loss of an objective, to be minimised; override it for losses of your own.

        By default that of the class below: `compute_loss(model, inputs[name])`, negated for `forget`. Where that class
        has `compute_retain_loss`, as open-unlearning's trainers, its `compute_loss(model, inputs)` without that part,
        and that part times its factor. The total must be linear in it: it is zero while the rest is computed.

        Args:
            name: which of `surgery_objectives`.
            model: as the Trainer gives it to `compute_loss`.
            inputs: one batch of the data loader, on the device.
            kwargs: what else the Trainer gives to `compute_loss`.

        Raises:
            ValueError: if `compute_loss` does not use `compute_retain_loss` where there is one, or there are other
                objectives than forget and retain.
        """
        if hasattr(self._base, "compute_retain_loss"):
            return self._part(name, model, inputs, kwargs)
        loss = self._base.compute_loss(model, inputs[name], **kwargs)
        return -loss if name == "forget" else loss

    def _part(self, name: str, model: nn.Module, inputs: Any, kwargs: dict[str, Any]) -> Tensor:
        if name == "retain" and self._retain is not None:
            (arguments, options, factor), self._retain = self._retain, None
            return factor * self._base.compute_retain_loss(*arguments, **options)
        if name != "forget":
            raise ValueError(f"surgery_objectives must be ('forget', 'retain') here, got {name!r}")
        total = self._base.compute_loss(model, inputs, **kwargs)
        if self._retain is None:
            raise ValueError(
                f"compute_loss of {type(self).__name__} must use compute_retain_loss, got no call"
            )
        arguments, options, placeholder = self._retain
        # The graph from the placeholder to the total is a few scalars.
        (factor,) = torch.autograd.grad(total, placeholder, retain_graph=True)
        self._retain = arguments, options, factor
        return total

    def compute_retain_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """While the forget loss is computed, a zero that stands for the retain loss."""
        if self._objective is None:
            return self._base.compute_retain_loss(*args, **kwargs)
        placeholder = torch.zeros((), device=self._trainer.args.device, requires_grad=True)
        self._retain = args, kwargs, placeholder
        return placeholder

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """In a training step the loss of the objective whose turn it is, otherwise that of the class below."""
        if self._objective is None:
            return self._base.compute_loss(model, inputs, *args, **kwargs)
        return self.objective_loss(self._objective, model, inputs, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """A forward and backward for every objective; returns the sum of the losses as the Trainer reports them."""
        losses = []
        for name in self.surgery_objectives:
            self._objective = name
            try:
                with self.surgery.objective(name):
                    losses.append(self._base.training_step(model, inputs, *args, **kwargs))
            finally:
                self._objective = None
        if self._trainer.accelerator.sync_gradients:
            self._combine()
        return torch.stack(losses).sum()

    def _combine(self) -> None:
        scaler = self._trainer.accelerator.scaler
        found = self.surgery.apply(scaler)
        if scaler is None and not bool(found.finite):
            self.surgery.zero_grad()
        self._steps.append(_seen(found))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds what surgery saw to the training loss's logs."""
        if "loss" in logs and self._surgery is not None and self._steps:
            logs |= _summary(self.surgery_objectives, self._steps)
            self._steps = []
        self._base.log(logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._base._save_optimizer_and_scheduler(output_dir)
        torch.save(self.surgery.state_dict(), self._file(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._base._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._file(checkpoint).exists():
            state = torch.load(self._file(checkpoint), map_location=self._trainer.args.device)
            self.surgery.load_state_dict(state)

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"surgery_{self._trainer.args.process_index}.pt"


class _Seen(NamedTuple):
    """Of a step, on its device: what is logged."""

    finite: Tensor
    cosines: Tensor | None
    rates: Tensor


def _check_reachable(accelerator: Any) -> None:
    kind = accelerator.distributed_type
    hidden = kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if hidden or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ValueError(f"trainer must leave whole gradients or DTensors in .grad (DDP, FSDP2), got {kind}")


def _seen(step: Step) -> _Seen:
    K = len(step.objectives)
    if step.rates is not None:
        return _Seen(step.finite, None, step.rates.mean().expand(K, K))
    whole = step.gramian.reshape(-1, K, K).sum(0)
    return _Seen(step.finite, cosines(whole), step.conflict_rate)


def _summary(names: Sequence[str], seen: Sequence[_Seen]) -> dict[str, float]:
    """Means over steps; those that are not finite count as skipped."""
    finite = [step for step in seen if bool(step.finite)]
    logs: dict[str, float] = {"surgery_skipped": float(len(seen) - len(finite))}
    for (a, first), (b, second) in combinations(enumerate(names), 2):
        angles = [step.cosines[a, b] for step in finite if step.cosines is not None]
        rates = [step.rates[a, b] for step in finite]
        for name, values in (("cosine", angles), ("conflict_rate", rates)):
            if values:
                logs[f"{name}_{first}_{second}"] = float(torch.stack(values).mean())
    return logs


def with_surgery(
    trainer: T, rule: str | Rule, *, objectives: Sequence[str] = ("forget", "retain"), **options: Any
) -> T:
    """A trainer class with surgery between its forget and its retain loss, under the same name.

        _register_trainer(with_surgery(GradDiff, "pcgrad"))

    is all that open-unlearning's registry needs: configurations stay as they are. `rule="sum"` is the class as it was.

    Args:
        trainer: with `compute_loss`, and `compute_retain_loss` in it, such as `GradDiff` and what derives from it; or a
            `transformers.Trainer` for batches `{"forget": ..., "retain": ...}`, which then ascends on the first.
        rule: of `GradientSurgery`. `agem` and `gru` only protect the retain loss, and leave its gradient out.
        objectives: as of `GradientSurgery`.
        options: further arguments of `GradientSurgery`, and the rule's.

    Returns:
        A class as `SurgeryMixin` describes it.
    """
    body = {
        "__doc__": trainer.__doc__,
        "__module__": trainer.__module__,
        "surgery_rule": rule,
        "surgery_objectives": tuple(objectives),
        "surgery_options": options,
    }
    made: T = type(trainer.__name__, (SurgeryMixin, trainer), body)  # type: ignore[assignment]
    return made

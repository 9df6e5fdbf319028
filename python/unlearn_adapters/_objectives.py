"""Unlearning objectives of a transformers Trainer, from hidden states and head alone."""

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Final, cast

import torch
from torch import Tensor, nn

from unlearn_kernels import token_loss
from unlearn_kernels.token_loss import HiddenRows, adapter_off, hidden_rows, linear_nll
from unlearn_kernels.token_loss._models import evaluating

Inputs = Mapping[str, Tensor]
Run = Callable[[Inputs], HiddenRows]


def _nll(rows: HiddenRows) -> Tensor:
    """Of every token, (B, T - 1)."""
    return linear_nll(*rows[:3], **rows.options)


def _as_reference(rows: HiddenRows) -> tuple[Tensor, Tensor, Tensor | None]:
    """As the losses take a reference."""
    return rows.h, rows.W, rows.options["bias"]


def _preference(name: str) -> Callable[..., Tensor]:
    def loss(forget: Inputs, run: Run, there: Run, **options: Any) -> Tensor:
        here, r = run(forget), _nll(there(forget))
        r = r.sum(1) if name == "npo" else r
        made: Tensor = getattr(token_loss, name)(*here[:3], r, **here.options, **options)
        return made

    return loss


def _alone(name: str) -> Callable[..., Tensor]:
    def loss(forget: Inputs, run: Run, there: Run, **options: Any) -> Tensor:
        here = run(forget)
        if name == "simnpo":
            options.setdefault("lengths", here.counts)
        made: Tensor = getattr(token_loss, name)(*here[:3], **here.options, **options)
        return made

    return loss


def _dpo(forget: Any, run: Run, there: Run, **options: Any) -> Tensor:
    win, lose = (run(forget[part]) for part in ("alternate", "original"))
    r_win, r_lose = (_nll(there(forget[part])).sum(1) for part in ("alternate", "original"))
    pairs = (win.h, win.labels), (lose.h, lose.labels)
    return token_loss.dpo(pairs[0], pairs[1], win.W, r_win, r_lose, **win.options, **options)


def _undial(forget: Inputs, run: Run, there: Run, **options: Any) -> Tensor:
    here = run(forget)
    reference = _as_reference(there(forget))
    return token_loss.undial(*here[:3], reference, **here.options, **options)


OBJECTIVES: Final[dict[str, Callable[..., Tensor]]] = {
    **{name: _alone(name) for name in ("grad_ascent", "simnpo", "wga", "satimp", "ceu")},
    **{name: _preference(name) for name in ("npo", "tnpo", "wtnpo")},
    "dpo": _dpo,
    "undial": _undial,
}
_ALONE: Final = {"grad_ascent", "simnpo", "wga", "satimp", "ceu"}


class UnlearnMixin:
    r"""Comes before a `transformers.Trainer`, and gives it an unlearning objective without logits in memory.

        class Forgetter(UnlearnMixin, Trainer):
            objective = "npo"
            objective_options = {"beta": 0.1}

    The loss of a batch `{"forget": ..., "retain": ...}`, each with `input_ids`, `attention_mask` and `labels`, is

    .. math:: \gamma L_{\text{objective}}(\text{forget}) + \alpha L_{\text{retain}}(\text{retain})

    In a batch without `retain` the second term is left out. `dpo` has `forget` as
    `{"alternate": preferred answers, "original": those to be forgotten}`. The model is called through its wrappers,
    so that DDP's and FSDP2's hooks run; a head that ZeRO-3 has partitioned is gathered, and whole until backward; one
    sharded by tensor parallelism, or under an adapter of its own, is refused. With PEFT and no reference given, the
    reference is the model with its adapters off; otherwise a frozen copy of the model, made with the first loss, or
    before `train` loads the checkpoint that it goes on from. ZeRO-3's partitions do not allow that: give one. A
    reference runs in evaluation mode.

    `evaluate` gives the same loss of such batches; a batch without `forget` is evaluated as by the Trainer, with its
    logits. The loss is a mean over each batch, and so is that of steps with gradient accumulation.

    Attributes:
        objective: grad_ascent, npo, tnpo, wtnpo, simnpo, dpo, wga, satimp, undial or ceu, as in
            `unlearn_kernels.token_loss`.
        objective_options: of that function: `beta`, `dialect`, ...
        retain: "nll", the likelihood loss; "kl", the divergence from the reference over every row, or a `kl_retain`
            dialect by `retain_options`.
        retain_options: of `kl_retain`.
        gamma: of the forget term.
        alpha: of the retain term.
        reference: a frozen model.

    Raises:
        ValueError: with the first loss, for unknown names and for models as above; for a batch to train on that has
            no `forget`.
    """

    objective: ClassVar[str] = "npo"
    objective_options: ClassVar[Mapping[str, Any]] = {}
    retain: ClassVar[str] = "nll"
    retain_options: ClassVar[Mapping[str, Any]] = {}
    gamma: ClassVar[float] = 1.0
    alpha: ClassVar[float] = 1.0
    reference: nn.Module | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # It is a mean over a batch: transformers must not take it for one over all that are accumulated.
        self.model_accepts_loss_kwargs = False

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; what is loaded to go on from is no reference."""
        trainer, above = cast("Any", self), cast("Any", super())
        if resume_from_checkpoint and self._needs_reference and self.reference is None:
            self._prepare_reference(trainer.model)
            if self.reference is not None and not trainer.is_model_parallel:
                self.reference.to(trainer.args.device)
        return above.train(resume_from_checkpoint, *args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """The loss of a batch with `forget`, without logits; of any other what the Trainer makes of it."""
        trainer, above = cast("Any", self), cast("Any", super())
        if "forget" not in inputs:
            return above.prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = self.compute_loss(model, trainer._prepare_inputs(inputs))
        return loss.mean(), None, None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum above; without outputs, because there are no logits."""
        if "forget" not in inputs:
            if model.training:
                raise ValueError(f"inputs must have forget to train on, got {', '.join(map(str, inputs))}")
            return cast("Any", super()).compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.retain not in ("nll", "kl"):
            raise ValueError(f"retain must be 'nll' or 'kl', got {self.retain!r}")
        if self._needs_reference:
            self._prepare_reference(model)
        forget = OBJECTIVES[self.objective]
        loss = self.gamma * forget(
            inputs["forget"],
            lambda x: hidden_rows(model, x),
            lambda x: self._there(model, x),
            **self.objective_options,
        )
        if inputs.get("retain") is not None and self.alpha:
            loss = loss + self.alpha * self.compute_retain_loss(model, inputs["retain"])
        return (loss, {}) if return_outputs else loss

    def compute_retain_loss(self, model: nn.Module, retain_inputs: Inputs) -> Tensor:
        """Of the retain batch; `with_surgery` takes it apart from the rest."""
        if self.retain == "nll":
            here = hidden_rows(model, retain_inputs)
            return linear_nll(*here[:3], **here.options, reduction="mean")
        here, there = (
            f(retain_inputs) for f in (lambda x: hidden_rows(model, x), lambda x: self._there(model, x))
        )
        return token_loss.kl_retain(
            here.h, here.W, _as_reference(there), **here.options, **self.retain_options
        )

    @property
    def _needs_reference(self) -> bool:
        return self.objective not in _ALONE or self.retain == "kl"

    def _prepare_reference(self, model: Any) -> None:
        bare = getattr(model, "module", model)
        if self.reference is None and not hasattr(bare, "disable_adapter"):
            if any(hasattr(p, "ds_id") for p in bare.parameters()):
                raise ValueError(
                    "reference must be given under ZeRO-3, whose partitions cannot be copied, got None"
                )
            self.reference = copy.deepcopy(bare).requires_grad_(False).eval()

    def _there(self, model: Any, inputs: Inputs) -> HiddenRows:
        bare = getattr(model, "module", model)
        off: AbstractContextManager[Any] = adapter_off(bare) if self.reference is None else nullcontext()
        there = bare if self.reference is None else self.reference
        with evaluating(there), off:
            return hidden_rows(there, inputs)

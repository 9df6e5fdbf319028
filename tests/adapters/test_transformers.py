"""Trainers with surgery, on a tiny GPT-2: against the loop written out, and against the class without it."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from unlearn_adapters.transformers import SurgeryMixin, with_surgery
from unlearn_kernels.surgery import GradientSurgery
from unlearn_kernels.testing import relative_error

VOCABULARY, LENGTH, ALPHA, GAMMA = 31, 7, 0.7, 1.3


def model() -> nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 8, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def texts(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


DATA = [{"forget": texts(2 * i), "retain": texts(2 * i + 1)} for i in range(12)]


def collate(samples: list[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    return {
        part: {key: torch.stack([s[part][key] for s in samples]) for key in ("input_ids", "labels")}
        for part in ("forget", "retain")
    }


class GradDiff(Trainer):
    """A forget and a retain loss in one sum, as open-unlearning's trainers have them."""

    def compute_retain_loss(self, model: nn.Module, retain_inputs: dict[str, Tensor]) -> Tensor:
        return model(**retain_inputs).loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forget_loss = -model(**inputs["forget"]).loss
        retain_loss = self.compute_retain_loss(model=model, retain_inputs=inputs["retain"])
        loss = GAMMA * forget_loss + ALPHA * retain_loss
        return (loss, None) if return_outputs else loss


class Plain(Trainer):
    """The same from one batch a loss: the class that only knows one."""


def trained(kind: type, folder: Path, **options) -> Trainer:
    settings = {
        "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "remove_unused_columns": False, "disable_tqdm": True, "seed": 3,
    } | options  # fmt: skip
    arguments = TrainingArguments(str(folder), **settings)
    trainer = kind(model=model(), args=arguments, train_dataset=DATA, data_collator=collate)
    trainer.train()
    return trainer


def weights(of: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in of.parameters()])


def by_hand(order: list[list[int]], rule: str, scales: tuple[float, float], norm: float = 0.0, **options):
    """The loop that a trainer stands for: `order` are the micro-batches of each step."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    surgery = GradientSurgery(net, rule, **options)
    steps = []
    for micro in order:
        for batch in (collate([DATA[i] for i in indices]) for indices in micro):
            for part, scale in zip(("forget", "retain"), scales, strict=True):
                with surgery.objective(part):
                    (scale / len(micro) * net(**batch[part]).loss).backward()
        steps.append(surgery.apply())
        if norm:
            torch.nn.utils.clip_grad_norm_(net.parameters(), norm)
        optimizer.step()
        surgery.zero_grad()
    return net, steps


def order_of(trainer: Trainer, micro: int, steps: int) -> list[list[list[int]]]:
    """The samples of each micro-batch of each step, as its sampler draws them."""
    loader = trainer.get_train_dataloader()
    known = {tuple(sample["forget"]["input_ids"].tolist()): i for i, sample in enumerate(DATA)}
    drawn, epoch = [], 0
    while len(drawn) < micro * steps:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        drawn += [[known[tuple(ids.tolist())] for ids in b["forget"]["input_ids"]] for b in loader]
        epoch += 1
    return [drawn[s * micro : (s + 1) * micro] for s in range(steps)]


def test_sum_is_the_class_as_it_was(tmp_path):
    plain = trained(GradDiff, tmp_path)
    ours = trained(with_surgery(GradDiff, "sum"), tmp_path)
    assert relative_error(weights(ours.model), weights(plain.model)) < 1e-6
    expected, got = ([log["loss"] for log in t.state.log_history if "loss" in log] for t in (plain, ours))
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rule", "options"), [("pcgrad", {}), ("gru", {"ema": {"retain": 0.3}}), ("doco", {})]
)
@pytest.mark.parametrize("micro", [1, 2])
def test_steps_are_those_of_the_loop(tmp_path, rule, options, micro):
    kind = with_surgery(GradDiff, rule, **options)
    assert (kind.__name__, kind.__module__) == ("GradDiff", __name__)
    ours = trained(kind, tmp_path, gradient_accumulation_steps=micro, max_grad_norm=0.5)
    net, steps = by_hand(order_of(ours, micro, 3), rule, (-GAMMA, ALPHA), norm=0.5, **options)
    assert relative_error(weights(ours.model), weights(net)) < 1e-6
    logs = [log for log in ours.state.log_history if "loss" in log]
    assert [log["surgery_skipped"] for log in logs] == [0.0] * 3
    if rule != "doco":
        cosines = [float(step.cosines[0, 1]) for step in steps]
        assert [log["cosine_forget_retain"] for log in logs] == pytest.approx(cosines, abs=1e-6)
    rates = [float(step.conflict_rate[0, 1]) for step in steps]
    assert [log["conflict_rate_forget_retain"] for log in logs] == pytest.approx(rates)


def test_a_trainer_of_one_loss_ascends_on_forget_batches(tmp_path):
    ours = trained(with_surgery(Plain, "agem"), tmp_path)
    net, _ = by_hand(order_of(ours, 1, 3), "agem", (-1.0, 1.0))
    assert relative_error(weights(ours.model), weights(net)) < 1e-6


class Three(SurgeryMixin, Trainer):
    surgery_rule = "mean"
    surgery_objectives = ("forget", "retain", "size")

    def objective_loss(self, name, model, inputs, **kwargs):
        if name == "size":
            return 1e-2 * sum(p.square().sum() for p in model.parameters())
        return super().objective_loss(name, model, inputs, **kwargs)


def test_objectives_of_ones_own(tmp_path):
    ours = trained(Three, tmp_path)
    logs = [log for log in ours.state.log_history if "loss" in log]
    assert {"cosine_forget_retain", "cosine_forget_size", "cosine_retain_size"} <= logs[0].keys()


def test_autocast_is_the_trainers(tmp_path):
    plain = trained(GradDiff, tmp_path, bf16=True)
    ours = trained(with_surgery(GradDiff, "sum"), tmp_path, bf16=True)
    assert relative_error(weights(ours.model), weights(plain.model)) < 1e-3
    assert not torch.equal(weights(ours.model), weights(trained(GradDiff, tmp_path).model))


def test_elements_have_rates_and_no_cosines(tmp_path):
    logs = trained(with_surgery(GradDiff, "sago"), tmp_path).state.log_history
    assert 0 < logs[0]["conflict_rate_forget_retain"] < 1
    assert "cosine_forget_retain" not in logs[0]


def test_a_step_that_is_not_finite_changes_nothing(tmp_path):
    class Broken(GradDiff):
        def compute_retain_loss(self, model, retain_inputs):
            factor = math.nan if self.state.global_step == 1 else 1.0
            return factor * super().compute_retain_loss(model, retain_inputs)

    ours = trained(with_surgery(Broken, "pcgrad"), tmp_path)
    drawn = order_of(ours, 1, 3)
    net, _ = by_hand([drawn[0], drawn[2]], "pcgrad", (-GAMMA, ALPHA))
    assert relative_error(weights(ours.model), weights(net)) < 1e-6
    logs = [log for log in ours.state.log_history if "surgery_skipped" in log]
    assert [log["surgery_skipped"] for log in logs] == [0.0, 1.0, 0.0]


def test_averages_are_resumed(tmp_path):
    kind = with_surgery(GradDiff, "gru", ema={"retain": 0.3})
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(kind, tmp_path, **options)
    assert (tmp_path / "checkpoint-2" / "surgery_0.pt").exists()
    resumed = kind(model=model(), args=whole.args, train_dataset=DATA, data_collator=collate)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert relative_error(weights(resumed.model), weights(whole.model)) < 1e-6
    (tmp_path / "checkpoint-2" / "surgery_0.pt").unlink()
    begun_anew = kind(model=model(), args=whole.args, train_dataset=DATA, data_collator=collate)
    begun_anew.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert relative_error(weights(begun_anew.model), weights(whole.model)) > 1e-5


def test_evaluation_is_the_class_as_it_was(tmp_path):
    ours = trained(with_surgery(GradDiff, "pcgrad"), tmp_path)
    batch = collate(DATA[:2])
    loss, outputs = ours.compute_loss(ours.model, batch, return_outputs=True)
    plain = GradDiff(model=ours.model, args=ours.args, data_collator=collate)
    assert outputs is None
    assert loss == plain.compute_loss(ours.model, batch)


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    class Unused(GradDiff):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return -model(**inputs["forget"]).loss

    with pytest.raises(ValueError, match=r"compute_loss of Unused must use compute_retain_loss, got no call"):
        trained(with_surgery(Unused, "pcgrad"), tmp_path)
    with pytest.raises(ValueError, match=r"surgery_objectives must be .*, got 'size'"):
        trained(with_surgery(GradDiff, "pcgrad", objectives=("forget", "size")), tmp_path)
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    ours = with_surgery(GradDiff, "pcgrad")(
        model=model(), args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    )
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match=r"whole gradients or DTensors .*, got .*DEEPSPEED"):
        _ = ours.surgery

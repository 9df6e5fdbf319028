"""A Trainer's objectives, against the loss functions of training code with the same models."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tests.token_loss import peers
from unlearn_adapters.transformers import OBJECTIVES, UnlearnMixin, with_surgery

OPTIONS = {
    "simnpo": {"beta": 1.5, "delta": 5.0},
    "satimp": {"beta1": 5.0, "beta2": 1.0},
    "npo": {"beta": 0.1},
    "ceu": {"skip": 0},
}
# Those that have a loss of that name among the peers'.
NAMED = ("npo", "simnpo", "dpo", "wga", "satimp", "undial", "ceu")


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": peers.WORDS}
    return LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, pad_token_id=0))


def loss_of(name: str, model: nn.Module, inputs, folder: Path, **settings) -> Tensor:
    body = {"objective": name, "objective_options": OPTIONS.get(name, {}), **settings}
    kind = type("Forgetter", (UnlearnMixin, Trainer), body)
    return kind(
        model=model, args=TrainingArguments(str(folder), use_cpu=True, report_to="none")
    ).compute_loss(model, inputs)


@pytest.mark.parametrize("name", NAMED)
def test_objectives_are_the_peers(tmp_path, name):
    model, reference, forget, retain = make(), make(1).requires_grad_(False), peers.batch(0), peers.batch(1)
    expected = peers.LOSSES[name](model, reference, forget, retain)
    inputs = {"forget": {"original": forget, "alternate": retain} if name == "dpo" else forget}
    found = loss_of(name, model, inputs, tmp_path, reference=reference)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(x, model.lm_head.weight)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_retain_terms(tmp_path):
    model, reference, forget, retain = make(), make(1).requires_grad_(False), peers.batch(0), peers.batch(1)
    inputs = {"forget": forget, "retain": retain}
    found = loss_of("grad_ascent", model, inputs, tmp_path, gamma=0.3)
    torch.testing.assert_close(found, peers.grad_diff(model, reference, forget, retain))
    found = loss_of(
        "grad_ascent", model, inputs, tmp_path, gamma=0.0, alpha=2.0, retain="kl", reference=reference
    )
    # open-unlearning divides by its rows' number, the last row of each text among them; the mixin has no last rows.
    here, there = (
        m(**{k: v for k, v in retain.items() if k != "labels"}).logits[:, :-1] for m in (model, reference)
    )
    expected = (there.softmax(-1) * (there.log_softmax(-1) - here.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(found, 2 * expected)


def test_references(tmp_path):
    peft = pytest.importorskip("peft")
    model, inputs = make(), {"forget": peers.batch(0)}
    start = loss_of("npo", model, inputs, tmp_path)
    torch.testing.assert_close(start, 20 * torch.log(torch.tensor(2.0)))  # a copy of itself
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    )
    found = loss_of("npo", adapted, inputs, tmp_path)
    with adapted.disable_adapter():
        expected = peers.npo(adapted, adapted, *[peers.batch(0)] * 2)
    assert found != expected
    expected = -20 * torch.nn.functional.logsigmoid(
        0.1 * (peers.sums(adapted, peers.batch(0)) - peers.sums(make(), peers.batch(0)))
    )
    torch.testing.assert_close(found, expected.mean())


def test_training_and_surgery(tmp_path):
    class Forgetter(UnlearnMixin, Trainer):
        objective = "npo"

    texts = [
        {part: {k: v[0] for k, v in peers.batch(i).items()} for part in ("forget", "retain")}
        for i in range(4)
    ]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, logging_steps=1, use_cpu=True, report_to="none",
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    collate = torch.utils.data.default_collate
    for kind in (Forgetter, with_surgery(Forgetter, "pcgrad")):
        trainer = kind(model=make(), args=arguments, train_dataset=texts, data_collator=collate)
        trainer.train()
        assert all(log["loss"] > 0 for log in trainer.state.log_history if "loss" in log)
    assert "cosine_forget_retain" in trainer.state.log_history[0]


def forgetter(folder: Path, model: nn.Module, texts=(), **settings):
    """A trainer by descent, a text a batch; settings that begin with an underscore are the class's."""
    own = {k[1:]: v for k, v in settings.items() if k.startswith("_")}
    arguments = {
        "learning_rate": 0.1, "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "remove_unused_columns": False, "disable_tqdm": True,
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    } | {k: v for k, v in settings.items() if not k.startswith("_")}  # fmt: skip
    kind = type("Forgetter", (UnlearnMixin, Trainer), {"objective": "npo", **own})
    return kind(
        model=model, args=TrainingArguments(str(folder), **arguments), train_dataset=list(texts),
        data_collator=lambda samples: samples[0],
    )  # fmt: skip


def test_what_a_checkpoint_holds_is_no_reference(tmp_path):
    texts = [{"forget": peers.batch(i), "retain": peers.batch(i + 5)} for i in range(4)]
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = forgetter(tmp_path / "whole", make(), texts, **settings)
    whole.train()
    resumed = forgetter(tmp_path / "resumed", make(), texts, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for trainer in (whole, resumed):
        torch.testing.assert_close(trainer.reference.state_dict(), make().state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict())
    alone = forgetter(tmp_path / "alone", make(), texts, **settings, _objective="simnpo")
    alone.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert alone.reference is None


def test_evaluation(tmp_path):
    model, reference = make(), make(1).requires_grad_(False)
    texts = [{"forget": peers.batch(i), "retain": peers.batch(i + 5)} for i in range(3)]
    trainer = forgetter(tmp_path, model, texts, _reference=reference)
    expected = torch.stack([
        peers.npo(model, reference, text["forget"], text["retain"]) + model(**text["retain"]).loss for text in texts
    ])  # fmt: skip
    assert trainer.evaluate(texts)["eval_loss"] == pytest.approx(float(expected.mean().detach()), rel=1e-5)
    assert trainer.predict(texts).predictions is None
    plain = [text["retain"] for text in texts]
    expected = torch.stack([model(**text).loss for text in plain]).mean()
    assert trainer.evaluate(plain)["eval_loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert trainer.predict(plain).predictions.shape[-1] == peers.WORDS
    with pytest.raises(
        ValueError, match="inputs must have forget to train on, got input_ids, attention_mask"
    ):
        trainer.compute_loss(model.train(), plain[0])


def test_references_run_in_evaluation_mode(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    ).train()
    trainer = forgetter(tmp_path, adapted)
    first, second = (trainer._there(adapted, peers.batch(0)).h for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in adapted.modules())
    assert not first.requires_grad


@pytest.mark.parametrize("labelled", [False, True])
def test_accumulated_batches_are_averaged(tmp_path, labelled):
    text = {"forget": peers.batch(0), "retain": peers.batch(1)}
    text |= {"labels": peers.batch(0)["labels"]} if labelled else {}  # which transformers counts
    found = []
    for batches in (1, 2):
        settings = {"max_steps": 1, "gradient_accumulation_steps": batches, "_objective": "grad_ascent"}
        trainer = forgetter(tmp_path, make(), [text] * batches, **settings)
        trainer.train()
        found.append(trainer.model.state_dict())
        assert not trainer.model_accepts_loss_kwargs
    torch.testing.assert_close(*found)


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match=f"objective must be one of {', '.join(OBJECTIVES)}, got 'nop'"):
        loss_of("nop", make(), {"forget": peers.batch(0)}, tmp_path)
    with pytest.raises(ValueError, match="retain must be 'nll' or 'kl', got 'mse'"):
        loss_of("npo", make(), {"forget": peers.batch(0)}, tmp_path, retain="mse")
    assert set(NAMED) < OBJECTIVES.keys()


class _Gathered:
    """deepspeed.zero.GatheredParameters: whole inside, empty outside."""

    def __init__(self, parameters):
        self.parameters = parameters

    def __enter__(self):
        for p in self.parameters:
            p.data = p.ds_whole

    def __exit__(self, *_):
        for p in self.parameters:
            p.data = p.data.new_empty(0)


def partition(model: nn.Module) -> None:
    head = model.lm_head
    for n, p in enumerate(head.parameters()):
        p.ds_id, p.ds_whole = n, p.data
        p.data = p.data.new_empty(0)


@pytest.fixture
def zero3(monkeypatch):
    deepspeed = ModuleType("deepspeed")
    deepspeed.__spec__ = ModuleSpec(
        "deepspeed", None
    )  # looked for, and without metadata not taken for installed
    deepspeed.zero = SimpleNamespace(GatheredParameters=_Gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)


@pytest.mark.parametrize("name", ["npo", "grad_ascent", "undial"])
def test_a_head_that_zero3_partitions_is_gathered(tmp_path, zero3, name):
    forget, retain, found = peers.batch(0), peers.batch(1), []
    for partitioned in (False, True):
        model, reference = make(), make(1).requires_grad_(False)
        if partitioned:
            partition(model)
            partition(reference)
        weight = model.lm_head.weight
        loss = loss_of(name, model, {"forget": forget, "retain": retain}, tmp_path, reference=reference)
        assert (weight.numel() == 0) == partitioned
        loss.backward()
        assert (weight.numel() == 0) == partitioned
        found.append((loss.detach(), weight.grad, model.model.layers[0].mlp.up_proj.weight.grad))
    torch.testing.assert_close(*found)


def test_zero3_and_no_reference(tmp_path, zero3):
    model = make()
    partition(model)
    with pytest.raises(ValueError, match="reference must be given under ZeRO-3"):
        loss_of("npo", model, {"forget": peers.batch(0)}, tmp_path)

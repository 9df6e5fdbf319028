"""TRL's fused head, by a stub with its names and by TRL itself; and DPO against the loss written out."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_adapters import trl
from unlearn_kernels.testing import randn

transformers = pytest.importorskip("transformers")

OUTPUTS = ("log_probs", "entropy", "is_top1")


class Plain:
    """What TRL's function computes, with logits."""

    @staticmethod
    def apply(hidden, weight, bias, labels, temperature, chunk, softcap, logit_scale, outputs=("log_probs",)):
        z = logit_scale * F.linear(hidden, weight, bias)
        z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
        log_p = z.log_softmax(-1)
        chosen = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        entropy = -(log_p.exp() * log_p).sum(-1) if "entropy" in outputs else None
        mean = z.mean(-1).detach() if "mean_logits" in outputs else None
        return chosen, entropy, None, mean, z.argmax(-1) == labels if "is_top1" in outputs else None


@pytest.fixture
def utils(monkeypatch: pytest.MonkeyPatch):
    names = ("trl", "trl.trainer", "trl.trainer.utils")
    for name in names:
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = sys.modules["trl.trainer.utils"]
    module._ChunkedLogProbFunction = Plain
    module._use_triton = lambda device: False
    yield module
    trl.uninstall()


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("outputs", [("log_probs",), OUTPUTS, ("log_probs", "mean_logits")])
def test_the_fused_head(utils, softcap, outputs):
    labels = torch.tensor([3, 0, 10, 4, 4])
    settings = (labels, 0.7, 64, softcap, 1.3, outputs)

    def found() -> list[Tensor | None]:
        leaves = [
            randn(*s, dtype=torch.float64, seed=i).requires_grad_()
            for i, s in enumerate(((5, 4), (11, 4), (11,)))
        ]
        made = utils._ChunkedLogProbFunction.apply(*leaves, *settings)
        upstream = torch.arange(1.0, 6.0, dtype=torch.float64)
        total = sum((upstream * x).sum() for x in made[:2] if x is not None)
        return [*made, *torch.autograd.grad(total, leaves)]

    expected = found()
    trl.install()
    trl.install()
    assert utils._ChunkedLogProbFunction is trl.LogProbs
    for ours, theirs in zip(found(), expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)
    trl.uninstall()
    assert utils._ChunkedLogProbFunction is Plain


def test_a_gathered_head_is_trls(utils, monkeypatch):
    trl.install()
    weight, seen = randn(11, 4), []
    weight.ds_id = 0
    monkeypatch.setattr(Plain, "apply", lambda *a: seen.append(a))
    utils._ChunkedLogProbFunction.apply(randn(5, 4), weight, None, torch.zeros(5).long(), 1.0, 64, None, 1.0)
    assert len(seen) == 1


def test_versions_without_a_fused_head(utils):
    del utils._ChunkedLogProbFunction
    with pytest.raises(ImportError, match="lazy_logits"):
        trl.install()
    utils._ChunkedLogProbFunction = Plain


def test_versions_that_compute_every_position(utils):
    del utils._use_triton
    trl.install()
    assert utils._ChunkedLogProbFunction is trl.LogProbs
    trl.uninstall()
    assert utils._ChunkedLogProbFunction is Plain
    assert not hasattr(utils, "_use_triton")


def llama():
    shape = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **heads))


def gemma():
    shape = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "head_dim": 8,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "final_logit_softcapping": 2.0}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**shape, **heads))


@pytest.mark.parametrize("make", [llama, gemma])
@pytest.mark.parametrize("outputs", [("log_probs",), OUTPUTS, ("log_probs", "mean_logits")])
@pytest.mark.parametrize("labelled", [True, False])
def test_trls_own_models(make, outputs, labelled, monkeypatch):
    theirs = pytest.importorskip("trl.trainer.utils")
    torch.manual_seed(0)
    model = make().eval()
    theirs.add_fused_lm_head(model, temperature=0.7, outputs=outputs)
    ids = torch.randint(37, (3, 9))
    labels = torch.where((torch.arange(9) > 4) & labelled, ids, -100)

    def found() -> tuple[dict[str, Tensor], list[Tensor]]:
        made = model(ids, labels=labels, fused_lm_head=True)
        grads = torch.autograd.grad(made.loss + made.log_probs.square().sum(), tuple(model.parameters()))
        return {name: x for name, x in made.items() if x is not None}, list(grads)

    expected, rows, fused = found(), [], trl.LogProbs.apply
    monkeypatch.setattr(
        trl.LogProbs, "apply", lambda hidden, *rest: rows.append(len(hidden)) or fused(hidden, *rest)
    )
    trl.install()
    try:
        actual = found()
    finally:
        trl.uninstall()
    assert rows == [3 * 4 * labelled]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    assert theirs._use_triton(torch.device("cpu")) is False


def test_dpo():
    def make(seed: int):
        torch.manual_seed(seed)
        shape = {"vocab_size": 31, "n_positions": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()

    def texts(seed: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(seed))
        return {"input_ids": ids, "labels": torch.where(torch.arange(9) < 3, -100, ids)}

    def likelihood(model, inputs: dict[str, Tensor]) -> Tensor:
        log_p = model(inputs["input_ids"]).logits[:, :-1].log_softmax(-1)
        labels = inputs["labels"][:, 1:]
        each = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
        return (each * (labels != -100)).sum(1)

    model, reference, chosen, rejected = make(0), make(1), texts(0), texts(1)
    loss = trl.dpo_loss(model, reference, chosen, rejected)
    margin = likelihood(model, chosen) - likelihood(model, rejected)
    margin = margin - (likelihood(reference, chosen) - likelihood(reference, rejected)).detach()
    expected = -F.logsigmoid(0.1 * margin).mean()
    torch.testing.assert_close(loss, expected)
    weight = model.transformer.wte.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(x, weight)[0] for x in (loss, expected)), rtol=1e-4, atol=1e-6
    )
    assert reference.transformer.wte.weight.grad is None

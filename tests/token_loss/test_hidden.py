"""Hidden rows of models, adapters that are off, and fingerprints."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.token_loss.models import D, Tiny, V, batches, transformers_model
from unlearn_kernels.token_loss import adapter_off, fingerprint, hidden_rows, linear_nll

KINDS = ["llama", "gemma2", "phi", "cohere", "granite", "gpt2"]


def plain_nll(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    output = model(**inputs)
    logits = (output[0] if isinstance(output, tuple) else output.logits)[:, :-1].double()
    labels = batch["labels"][:, 1:]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_models_give_the_nll_of_their_logits(kind: str) -> None:
    pytest.importorskip("transformers")
    model, (batch,) = transformers_model(kind), batches((3,))
    rows = hidden_rows(model, batch)
    nll = linear_nll(rows.h, rows.W, rows.labels, **rows.options)
    torch.testing.assert_close(nll.double(), plain_nll(model, batch), rtol=1e-5, atol=1e-5)
    assert rows.counts is not None
    assert rows.counts.tolist() == (batch["labels"] != -100).sum(1).tolist()
    # Differentiable, and the head is afterwards the head.
    nll.sum().backward()
    weight = next(model.parameters())
    assert weight.grad is not None
    ours = weight.grad.clone()
    model.zero_grad()
    plain_nll(model, batch).sum().backward()
    torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-5)


def test_no_logits_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (batch,) = Tiny().eval(), batches((3,))
    largest = 0
    plain = nn.functional.linear

    def watched(x: Tensor, *args: Any) -> Tensor:
        nonlocal largest
        out = plain(x, *args)
        largest = max(largest, out.shape[-1])
        return out

    monkeypatch.setattr(nn.functional, "linear", watched)
    hidden_rows(model, batch)
    assert largest == D


def test_without_labels_every_token_that_is_attended_to_counts() -> None:
    (batch,) = batches((3,))
    rows = hidden_rows(Tiny().eval(), {k: v for k, v in batch.items() if k != "labels"})
    expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
    assert torch.equal(rows.labels, expected)


def test_models_that_cannot_be_read_are_named() -> None:
    (batch,) = batches((2,))
    with pytest.raises(ValueError, match=r"Linear has no get_output_embeddings\(\); pass rows="):
        hidden_rows(nn.Linear(2, 2), batch)
    model = Tiny()
    model.lm_head = nn.Sequential(nn.Linear(D, V))
    with pytest.raises(ValueError, match="its head must be a plain linear layer, got Sequential"):
        hidden_rows(model, batch)

    class Odd(Tiny):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return (super().forward(*args, **kwargs)[0].sin(),)

    odd = Odd()
    with pytest.raises(ValueError, match="Odd changes logits after its head in a way that is not known"):
        hidden_rows(odd, batch)
    assert type(odd.lm_head) is nn.Linear


def test_sequences_of_one_token_predict_nothing() -> None:
    rows = hidden_rows(Tiny().eval(), {"input_ids": torch.zeros(3, 1, dtype=torch.int64)})
    assert rows.h.shape == (3, 0, D)
    assert rows.labels.shape == (3, 0)
    assert linear_nll(rows.h, rows.W, rows.labels, **rows.options).shape == (3, 0)


def test_the_loss_of_a_router_is_not_dropped_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model, (batch,) = transformers.MixtralForCausalLM(config), batches((2,))
    hidden_rows(model, batch)
    model.config.output_router_logits = True
    with torch.no_grad():
        hidden_rows(model, batch)
    assert not [w for w in recwarn.list if w.category is RuntimeWarning]
    with pytest.warns(RuntimeWarning, match="MixtralForCausalLM makes an auxiliary loss of its router"):
        hidden_rows(model, batch)


def lora(model: nn.Module, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_adapter_off_is_the_base_model(saved: list[str] | None) -> None:
    pytest.importorskip("transformers")
    base, (batch,) = transformers_model("llama"), batches((3,))
    with torch.no_grad():
        expected, marked = plain_nll(base, batch), fingerprint(base)
    model = lora(copy.deepcopy(base), modules_to_save=saved).eval()
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
        if "modules_to_save" in name:
            p.data.add_(1.0)
    flags = [p.requires_grad for p in model.parameters()]
    with adapter_off(model) as reference, torch.no_grad():
        rows = hidden_rows(reference, batch)
        nll = linear_nll(rows.h, rows.W, rows.labels, **rows.options)
        assert fingerprint(reference) == marked
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert fingerprint(model) != marked
    if saved is None:
        with torch.no_grad():
            rows = hidden_rows(model, batch)
            assert not torch.allclose(linear_nll(rows.h, rows.W, rows.labels), nll)
            assert torch.allclose(
                linear_nll(rows.h, rows.W, rows.labels).double(), plain_nll(model, batch), rtol=1e-5
            )
    else:
        with pytest.raises(ValueError, match="must be a plain linear layer, got ModulesToSaveWrapper"):
            hidden_rows(model, batch)


def test_adapter_off_of_transformers_own_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = transformers_model("llama")
    marked = fingerprint(model)
    with pytest.raises(ValueError, match="must have adapters that can be switched off, got LlamaForCausalLM"):
        adapter_off(model).__enter__()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with adapter_off(model):
        assert fingerprint(model) == marked
    assert fingerprint(model) != marked


def test_merged_adapters_and_prompts_are_refused() -> None:
    peft = pytest.importorskip("peft")
    model = lora(transformers_model("llama"))
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"merged into the weights of .*q_proj; unmerge them first"):
        adapter_off(model).__enter__()
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="learn a prompt"):
        adapter_off(peft.get_peft_model(transformers_model("llama"), prompt)).__enter__()


def test_fingerprints_tell_buffers_that_are_not_saved() -> None:
    pytest.importorskip("transformers")
    model = transformers_model("llama")
    rotary, adapted = model.model.rotary_emb, lora(transformers_model("llama"))
    assert "model.rotary_emb.inv_freq" not in model.state_dict()
    marked = fingerprint(model)
    with adapter_off(adapted):
        assert fingerprint(adapted) == marked
        assert fingerprint(torch.compile(adapted)) == marked
    rotary.inv_freq = rotary.inv_freq * 0.5  # another base of the rotation
    assert fingerprint(model) != marked


def test_fingerprints_tell_names_dtypes_and_bits() -> None:
    model = Tiny()
    marks = {fingerprint(model), fingerprint(Tiny(torch.bfloat16)), fingerprint(Tiny(torch.float64))}
    with torch.no_grad():
        model.mix.bias[3] = torch.nextafter(model.mix.bias[3], torch.tensor(9.0))
    marks.add(fingerprint(model))
    assert len(marks) == 4
    assert fingerprint(Tiny()) == fingerprint(Tiny())
    assert fingerprint(nn.parallel.DataParallel(Tiny())) == fingerprint(Tiny())
    assert fingerprint(torch.compile(nn.parallel.DataParallel(Tiny()))) == fingerprint(Tiny())
    inside = Tiny()
    inside.mix = torch.compile(inside.mix)
    assert fingerprint(inside) == fingerprint(Tiny())
    with pytest.raises(ValueError, match=r"embed\.weight is on the meta device"):
        fingerprint(Tiny().to("meta"))

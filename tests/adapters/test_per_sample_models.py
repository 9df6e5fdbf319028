"""`PerSampleGradients` on models of transformers, diffusers and peft, with random weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.models import clipped, looped, sqnorms
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.testing import randn, relative_error

transformers = pytest.importorskip("transformers")

EXACT = 1e-9
# Llama's and Gemma's RMSNorm round to float32 inside.
ROUNDED = 1e-6
B, T, V = 3, 7, 50
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = SMALL | {"num_key_value_heads": 1, "vocab_size": V}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=V, n_positions=16)
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def gemma() -> nn.Module:
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(head_dim=8, **GROUPED))


def gemma3() -> nn.Module:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(head_dim=8, **GROUPED))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(
        transformers.BertConfig(vocab_size=V, max_position_embeddings=16, **SMALL)
    )


def exact_model(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64, without dropout, with weights and scales that are not at their start."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) / 10)
    return model


def language_loss(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    """The mean over tokens, summed over samples: what a causal or masked model is trained on."""
    ids, labels = sample["input_ids"], sample["labels"]
    logits = model(**{k: v for k, v in sample.items() if k != "labels"}).logits
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(ids)
    return nll.mean(1).sum()


def tokens(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, V, (B, T), generator=generator)
    return {"input_ids": ids, "labels": ids.roll(-1, 1)}


def one_by_one(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(B)]


def check(
    model: nn.Module, batch: Any, samples: list[Any], loss: Any, allowed: float = EXACT, **options: Any
) -> dict[str, str]:
    """Norms, norms alone, and the clipped gradient, against a loop."""
    exact = looped(model, samples, loss)
    assert sum(g.abs().sum() > 0 for g in exact.values()) > len(exact) / 2
    max_norm = float(sqnorms(exact).sqrt().median())
    expected = clipped(exact, max_norm, mean=False)
    with PerSampleGradients(model, loss_reduction="sum", keep="norms", **options) as gradients:
        loss(model, batch).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < allowed
    with PerSampleGradients(model, loss_reduction="sum", **options) as gradients:
        loss(model, batch).backward()
        by = gradients.sqnorms("parameter")
        for name, g in exact.items():
            # Relative to the whole: a key's bias has no gradient but rounding errors.
            error = (by[name] - g.flatten(1).square().sum(1)).abs() / sqnorms(exact)
            assert float(error.max()) < allowed, name
        assert relative_error(gradients.clip_(max_norm), sqnorms(exact).sqrt()) < allowed
    for name, p in model.named_parameters():
        if name in exact and p.grad is not None:
            assert float((p.grad - expected[name]).norm()) < allowed * max_norm * B, name
    model.zero_grad()
    return gradients.layers


@pytest.mark.parametrize("make", [gpt2, llama, gemma, gemma3, bert], ids=lambda make: make.__name__)
def test_language_models(make):
    model, batch = exact_model(make), tokens()
    allowed = EXACT if make in (gpt2, bert) else ROUNDED
    layers = check(model, batch, one_by_one(batch), language_loss, allowed)
    assert {"linear", "embedding", "norm"} == set(layers.values())


def test_gpt2_takes_positions_of_one_row_and_of_all():
    """Opacus cannot stack the norms of a `[1, T]` embedding with those of the others (its issue 841)."""
    model, batch = exact_model(gpt2), tokens()
    at = torch.arange(T)
    samples = [one | {"position_ids": at[None]} for one in one_by_one(batch)]
    for rows in (1, B):
        check(model, batch | {"position_ids": at.expand(rows, T)}, samples, language_loss)


def test_untied_and_padded_gpt2():
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=V, n_positions=16, tie_word_embeddings=False
    )
    model, batch = exact_model(lambda: transformers.GPT2LMHeadModel(config)), tokens()
    batch["attention_mask"] = torch.ones(B, T, dtype=torch.long)
    batch["attention_mask"][1, 4:] = 0
    check(model, batch, one_by_one(batch), language_loss)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model, batch = exact_model(llama).train(), tokens()
    exact = looped(model, one_by_one(batch), language_loss)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for keep in ("factors", "norms"):
        with PerSampleGradients(model, loss_reduction="sum", keep=keep) as gradients:
            language_loss(model, batch).backward()
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < ROUNDED


def test_the_loss_of_the_model_itself_is_a_mean():
    model, batch = exact_model(gpt2), tokens()
    exact = looped(model, one_by_one(batch), lambda m, one: m(**one).loss)
    with PerSampleGradients(model) as gradients:
        model(**batch).loss.backward()
        # The model's own loss rounds its logits to float32.
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < ROUNDED


def test_vision_transformer():
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=5)
    model = exact_model(lambda: transformers.ViTForImageClassification(config))
    x = randn(B, 3, 8, 8, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(model(x).logits, torch.ones(len(x), dtype=torch.long), reduction="sum")

    with pytest.raises(ValueError, match=r"embeddings \(ViTEmbeddings; cls_token, position_embeddings\)"):
        PerSampleGradients(model)
    layers = check(model, x, list(x.split(1)), loss, fallback="vmap")
    assert [path for path, kind in layers.items() if kind == "vmap"] == ["vit.embeddings"]


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=0.0)
    model, batch = exact_model(lambda: peft.get_peft_model(llama(), config)), tokens()
    layers = check(model, batch, one_by_one(batch), language_loss, ROUNDED)
    assert all("lora_" in path for path in layers)
    assert len(layers) == 12


def test_diffusion_unet():
    diffusers = pytest.importorskip("diffusers")
    model = exact_model(
        lambda: diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )
    noise, at, words = randn(B, 3, 8, 8, dtype=torch.float64), torch.tensor([5, 300, 900]), randn(B, 4, 8)
    samples = list(zip(noise.split(1), at.split(1), words.double().split(1), strict=True))

    def loss(model: nn.Module, sample: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        noise, at, words = sample
        return (model(noise, at, words).sample - noise).square().flatten(1).mean(1).sum()

    layers = check(model, (noise, at, words.double()), samples, loss)
    assert set(layers.values()) == {"conv", "linear", "norm"}

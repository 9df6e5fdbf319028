"""`InfluenceCollector` on models of transformers and diffusers, with random weights, against a loop over samples."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.adapters.test_per_sample_models import B, exact_model, gpt2, llama, tokens
from tests.per_sample.models import flattened, looped
from unlearn_kernels.influence import (
    InfluenceCollector,
    Projection,
    class_losses,
    language_losses,
    layer_projections,
    noise_losses,
)
from unlearn_kernels.testing import randn, relative_error

transformers = pytest.importorskip("transformers")

EXACT = 1e-9
# Llama's RMSNorm rounds to float32 inside.
ROUNDED = 1e-6


def check(path: Path, model: nn.Module, batch: dict[str, Tensor], losses: object, allowed: float) -> None:
    """One projection of everything, one for each parameter, and a run over the samples one by one."""
    samples = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(B)]
    exact = looped(model, samples, lambda m, one: losses(m, one).sum())
    whole = flattened(exact)
    projection = Projection(whole.shape[1], 24, "sjlt", 1)
    layers = layer_projections(model, 16, "two_sided", seed=2)
    beside = torch.cat([layers[name](g.flatten(1)) for name, g in exact.items()], 1)
    for name, p, expected in (("whole", projection, projection(whole)), ("layers", layers, beside)):
        store = InfluenceCollector.store(path / name, model, p)
        collector = InfluenceCollector(model, p, store, loss=losses)
        assert relative_error(collector.rows(batch), expected) < allowed
        data = [{k: v[i] for k, v in batch.items()} for i in range(B)]
        assert collector.collect(data, batch_size=2) == B
        assert relative_error(torch.cat([r for _, r in store.blocks()]), expected) < 3e-6


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_language_models(tmp_path: Path, reduction: str) -> None:
    losses = partial(language_losses, reduction=reduction)
    batch = tokens()
    batch["labels"][1, 3:] = -100
    for make, allowed in ((gpt2, EXACT), (llama, ROUNDED)):
        model = exact_model(make)
        check(tmp_path / make.__name__, model, batch, losses, allowed)
    logits = model(batch["input_ids"]).logits[1, :2]
    nll = -logits.log_softmax(-1)[torch.arange(2), batch["labels"][1, 1:3]]
    expected = nll.sum() if reduction == "sum" else nll.mean()
    assert relative_error(losses(model, batch)[1], expected) < EXACT
    with pytest.raises(ValueError, match="batch must have labels, got input_ids"):
        losses(model, {"input_ids": batch["input_ids"]})


def test_classifiers(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=4, **small)
    model = exact_model(lambda: transformers.BertForSequenceClassification(config))
    batch = {"input_ids": tokens()["input_ids"], "labels": torch.tensor([0, 3, 1])}
    check(tmp_path, model, batch, class_losses, EXACT)


def test_diffusion_unet(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = exact_model(
        lambda: diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4,
            attention_head_dim=4,
        )
    )
    batch = {
        "sample": randn(B, 3, 8, 8, dtype=torch.float64),
        "timestep": torch.tensor([5, 300, 900]),
        "target": randn(B, 3, 8, 8, dtype=torch.float64, seed=1),
    }
    check(tmp_path, model, batch, noise_losses, EXACT)
    with pytest.raises(ValueError, match="batch must have timestep, target, got sample"):
        noise_losses(model, {"sample": batch["sample"]})

"""DoCo's parts against diffusers' own schedulers and the formulas written out, and its step against autograd."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from unlearn_adapters.diffusers import (
    DoCo,
    PatchDiscriminator,
    cross_attention_kv,
    denoising_target,
    discriminator_loss,
    generator_loss,
    predicted_x0,
    train_only,
)
from unlearn_kernels.surgery import GradientSurgery, project_conflict_, rules
from unlearn_kernels.testing import randn, relative_error

KINDS = ("epsilon", "v_prediction", "sample")
BATCH, CHANNELS, SIDE, TOKENS, WIDTH = 3, 4, 8, 2, 8


def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIDE, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 8),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip


def samples(seed: int, count: int = BATCH) -> Tensor:
    return randn(count, CHANNELS, SIDE, SIDE, seed=seed)


def prompts(seed: int, count: int = BATCH) -> Tensor:
    return randn(count, TOKENS, WIDTH, seed=seed)


def test_keys_and_values_of_cross_attention_alone():
    model = unet()
    found = cross_attention_kv(model)
    assert len(found) == 2 * sum(name.endswith("attn2") for name, _ in model.named_modules())
    assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in found)
    assert all(p.shape[1] == WIDTH for p in found.values())
    train_only(model, list(found.values()))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(found)
    with pytest.raises(ValueError, match=r"attn2\.to_k and attn2\.to_v, got none"):
        cross_attention_kv(nn.Linear(2, 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schedule", [DDPMScheduler, DDIMScheduler])
def test_predicted_x0_is_the_schedulers(kind, schedule):
    scheduler = schedule(prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    timesteps = torch.tensor([1, 400, 998])
    noisy, output = samples(1), samples(2)
    found = predicted_x0(scheduler, output, timesteps, noisy)
    for i, t in enumerate(timesteps):
        theirs = scheduler.step(output[i : i + 1], int(t), noisy[i : i + 1]).pred_original_sample
        assert relative_error(found[i], theirs[0]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_puts_out_the_target_predicts_the_sample(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    clean, noise, timesteps = samples(1), samples(2), torch.tensor([0, 300, 600])
    wanted = denoising_target(scheduler, clean, noise, timesteps)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    assert relative_error(predicted_x0(scheduler, wanted, timesteps, noisy), clean) < 1e-5
    if kind == "v_prediction":
        assert relative_error(wanted, scheduler.get_velocity(clean, noise, timesteps)) < 1e-6


def test_other_predictions_are_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    for call in (predicted_x0, denoising_target):
        with pytest.raises(ValueError, match="must be one of epsilon, v_prediction, sample, got 'flow'"):
            call(scheduler, samples(1), torch.tensor([1, 2, 3]), samples(1))


def test_discriminator_is_a_map_of_logits():
    published = PatchDiscriminator()
    assert published(randn(2, 4, 64, 64)).shape[:2] == (2, 1)
    kinds = [type(layer) for layer in published]
    assert kinds.count(nn.Conv2d) == 5
    assert kinds.count(nn.BatchNorm2d) == 3
    logits = PatchDiscriminator(CHANNELS, (8,))(samples(1))
    assert logits.shape[:2] == (BATCH, 1)
    assert logits.shape[2] > 1


def test_losses_are_cross_entropies():
    anchor, target = randn(3, 1, 2, 2, seed=1).double(), randn(3, 1, 2, 2, seed=2).double()
    p, q = anchor.sigmoid(), target.sigmoid()
    torch.testing.assert_close(discriminator_loss(anchor, target), -(1 - p).log().mean() - q.log().mean())
    torch.testing.assert_close(generator_loss(target), -(1 - q).log().mean())


def method(rule, **options) -> DoCo:
    model, frozen = unet(), unet().requires_grad_(False)
    parameters = list(cross_attention_kv(model).values())
    train_only(model, parameters)
    torch.manual_seed(1)
    discriminator = PatchDiscriminator(CHANNELS, (8, 8))
    return DoCo(
        model, frozen, DDPMScheduler(prediction_type="v_prediction"), torch.optim.SGD(parameters, lr=0.5),
        discriminator, torch.optim.SGD(discriminator.parameters(), lr=0.1), GradientSurgery(parameters, rule),
        **options,
    )  # fmt: skip


def stepped(doco: DoCo, steps: int = 1):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        found = doco.step(
            samples(step),
            prompts(step),
            prompts(step + 50),
            (samples(step + 9, 2), prompts(step + 9, 2)),
            generator,
        )
    return found


@pytest.mark.parametrize("retain_target", ["noise", "frozen"])
def test_step_is_the_formulas(retain_target):
    doco = method("doco", retain_target=retain_target)
    model, discriminator = copy.deepcopy(doco.unet), copy.deepcopy(doco.discriminator).requires_grad_(True)
    before = [p.detach().clone() for p in cross_attention_kv(model).values()]
    # A step before, so that the model is no longer its frozen copy.
    for net in (doco.unet, model):
        with torch.no_grad():
            for i, p in enumerate(cross_attention_kv(net).values()):
                p.add_(randn(*p.shape, seed=i), alpha=0.1)
    before = [p.detach().clone() for p in cross_attention_kv(model).values()]
    found = stepped(doco)

    generator = torch.Generator().manual_seed(0)
    clean, parameters = samples(0), list(cross_attention_kv(model).values())
    t = torch.randint(1000, (BATCH,), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    noisy = doco.scheduler.add_noise(clean, noise, t)
    target, anchor = (
        predicted_x0(doco.scheduler, net(noisy, t, p).sample, t, noisy)
        for net, p in ((model, prompts(0)), (doco.frozen, prompts(50)))
    )
    loss = discriminator_loss(discriminator(anchor), discriminator(target.detach()))
    torch.testing.assert_close(found.discriminator, loss.detach())
    loss.backward()
    with torch.no_grad():
        for p in discriminator.parameters():
            p.sub_(p.grad, alpha=0.1)
    forget = torch.autograd.grad(generator_loss(discriminator(target)), parameters)
    kept = samples(9, 2)
    t = torch.randint(1000, (2,), generator=generator)
    noise = torch.randn(kept.shape, generator=generator)
    noisy = doco.scheduler.add_noise(kept, noise, t)
    wanted = doco.scheduler.get_velocity(kept, noise, t)
    if retain_target == "frozen":
        wanted = doco.frozen(noisy, t, prompts(9, 2)).sample
    retain = torch.autograd.grad(F.mse_loss(model(noisy, t, prompts(9, 2)).sample, wanted), parameters)
    combined = [f.clone() for f in forget]
    project_conflict_(combined, retain, rule="doco")
    assert any(not torch.equal(c, f) for c, f in zip(combined, forget, strict=True))
    expected = [b - 0.5 * c for b, c in zip(before, combined, strict=True)]
    for p, e in zip(cross_attention_kv(doco.unet).values(), expected, strict=True):
        assert relative_error(p.detach(), e) < 1e-5
    for p, e in zip(doco.discriminator.parameters(), discriminator.parameters(), strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p, e)


def test_warm_up_teaches_the_discriminator_alone():
    doco = method("doco", warm_up=2)
    before = copy.deepcopy(doco.unet.state_dict())
    first = [p.detach().clone() for p in doco.discriminator.parameters()]
    found = stepped(doco, 2)
    assert (found.forget, found.retain, found.surgery) == (None, None, None)
    assert all(torch.equal(x, before[name]) for name, x in doco.unet.state_dict().items())
    assert any(not torch.equal(a, b) for a, b in zip(first, doco.discriminator.parameters(), strict=True))
    found = stepped(doco, 1)
    assert found.surgery is not None
    assert not all(torch.equal(x, before[name]) for name, x in doco.unet.state_dict().items())


def test_nothing_but_keys_and_values_changes():
    doco = method(rules.Constant([1.0, 0.1]))
    before = copy.deepcopy(doco.unet.state_dict())
    found = stepped(doco, 2)
    changed = {name for name, x in doco.unet.state_dict().items() if not torch.equal(x, before[name])}
    assert changed == set(cross_attention_kv(doco.unet))
    assert all(p.grad is None for p in doco.unet.parameters())
    torch.testing.assert_close(found.surgery.weights, torch.tensor([1.0, 0.1], dtype=torch.float64))


def test_unknown_retain_target_is_refused():
    with pytest.raises(ValueError, match="retain_target must be 'noise' or 'frozen', got 'x0'"):
        method("doco", retain_target="x0")

"""Concept removal in diffusers models: DoCo's domain correction with a concept-preserving gradient.

`DoCo` is a training step; its parts work alone: `cross_attention_kv` picks the parameters, `predicted_x0` inverts the
noise, `PatchDiscriminator`, `discriminator_loss` and `generator_loss` are the adversarial side, and
`unlearn_kernels.surgery.GradientSurgery` holds both gradients.

Source: DoCo, arXiv 2405.15304; github.com/yongliang-wu/DoCo.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from unlearn_kernels.surgery import GradientSurgery, Step

KINDS = ("epsilon", "v_prediction", "sample")


def cross_attention_kv(unet: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that map a prompt to keys and values, by name: `to_k` and `to_v` of every `attn2`.

    Args:
        unet: `UNet2DConditionModel`, or another model of diffusers whose cross-attention has these names.

    Raises:
        ValueError: if there are none.
    """
    found = {
        name: p
        for name, p in unet.named_parameters()
        if {"attn2"} & set(parts := name.split(".")) and {"to_k", "to_v"} & set(parts)
    }
    if not found:
        raise ValueError("unet must have parameters named attn2.to_k and attn2.to_v, got none")
    return found


def train_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Freezes all others."""
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)


def _scales(scheduler: Any, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """`sqrt(alpha_bar)` and `sqrt(1 - alpha_bar)` of every sample, (B, 1, 1, 1), computed in float32."""
    share = scheduler.alphas_cumprod.to(like.device, torch.float32)[timesteps]
    share = share.view(-1, *[1] * (like.dim() - 1))
    return share.sqrt(), (1 - share).sqrt()


def _kind(scheduler: Any) -> str:
    kind: str = scheduler.config.prediction_type
    if kind not in KINDS:
        raise ValueError(f"scheduler.config.prediction_type must be one of {', '.join(KINDS)}, got {kind!r}")
    return kind


def predicted_x0(scheduler: Any, output: Tensor, timesteps: Tensor, noisy: Tensor) -> Tensor:
    r"""What the model takes the clean sample for, of a batch with a timestep a sample. Differentiable.

    .. math::
        \hat x_0 = (x_t - \sigma \epsilon) / \alpha \quad\text{or}\quad \alpha x_t - \sigma v \quad\text{or the output},
        \qquad \alpha = \sqrt{\bar\alpha_t}, \; \sigma = \sqrt{1 - \bar\alpha_t}

    A scheduler's own `step` takes one timestep for all, and may clip or threshold the result; this does not.

    Args:
        scheduler: with `alphas_cumprod` and `config.prediction_type`, such as DDPM's and DDIM's.
        output: (B, C, H, W), of the model.
        timesteps: (B,) integers.
        noisy: (B, C, H, W), what the model was given.

    Raises:
        ValueError: for another prediction type than epsilon, v_prediction and sample.
    """
    kind = _kind(scheduler)
    if kind == "sample":
        return output
    alpha, sigma = _scales(scheduler, timesteps, noisy)
    if kind == "epsilon":
        return (noisy - sigma * output) / alpha
    return alpha * noisy - sigma * output


def denoising_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What a model of this scheduler is trained to put out: the noise, the velocity or the clean sample.

    Raises:
        ValueError: as `predicted_x0`.
    """
    kind = _kind(scheduler)
    if kind == "v_prediction":
        alpha, sigma = _scales(scheduler, timesteps, clean)
        return alpha * noise - sigma * clean
    return noise if kind == "epsilon" else clean


class PatchDiscriminator(nn.Sequential):
    """PatchGAN: 4 x 4 convolutions of stride 2, then one to a map of logits, one for every patch.

    Args:
        channels: of the samples: 4 for latents of Stable Diffusion.
        widths: of the convolutions; batch norm from the second on. The defaults are DoCo's, for 64 x 64 latents.
    """

    def __init__(self, channels: int = 4, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        layers: list[nn.Module] = []
        for depth, (inputs, outputs) in enumerate(zip((channels, *widths[:-1]), widths, strict=True)):
            layers.append(nn.Conv2d(inputs, outputs, 4, stride=2, padding=1))
            if depth:
                layers.append(nn.BatchNorm2d(outputs))
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Conv2d(widths[-1], 1, 4, padding=2))


def _against(logits: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def discriminator_loss(anchor: Tensor, target: Tensor) -> Tensor:
    """Tells the domains apart: `BCE(anchor, 0) + BCE(target, 1)`, from logits of any shape."""
    return _against(anchor, 0.0) + _against(target, 1.0)


def generator_loss(target: Tensor) -> Tensor:
    """Makes the target's samples look like the anchor's: `BCE(target, 0)`, from logits of any shape."""
    return _against(target, 0.0)


class Found(NamedTuple):
    """Of a step, on the device: looking is what costs a wait.

    Attributes:
        discriminator: its loss, ().
        forget: the generator's loss, (); None while warming up.
        retain: the denoising loss of the retain prompts, (); None while warming up.
        surgery: what `GradientSurgery` found; None while warming up.
    """

    discriminator: Tensor
    forget: Tensor | None = None
    retain: Tensor | None = None
    surgery: Step | None = None


class DoCo:
    r"""A training step that draws what a target prompt makes to what an anchor prompt made, and spares the rest.

    One noisy sample goes to the model with the target prompt c and to a frozen copy with the anchor prompt c*. A
    discriminator learns to tell the predicted clean samples apart, and the model to deceive it:

    .. math::
        L_D = BCE(D(\hat x_0^*), 0) + BCE(D(\hat x_0), 1), \qquad L_{forget} = BCE(D(\hat x_0), 0), \qquad
        L_{retain} = \| \epsilon_\theta(z_t, c_r) - \epsilon \|^2

    Both losses of the model have a gradient of their own, which `surgery` puts together; with the rule `doco`, the
    forget gradient of every tensor loses what works against the retain gradient. Unlike in the published code, the
    discriminator has no gradient from the model's loss left in its own, and no graph is retained.

        parameters = cross_attention_kv(unet)
        train_only(unet, list(parameters.values()))
        surgery = GradientSurgery(parameters.values(), "doco")

    Args:
        unet: called as `unet(sample, timesteps, prompts).sample`.
        frozen: a copy of it as it was.
        scheduler: the noise's, see `predicted_x0`.
        optimizer: of the model's trainable parameters.
        discriminator: of samples, to logits.
        discriminator_optimizer: of it; published: Adam with `betas=(0.5, 0.999)`.
        surgery: over the model's trainable parameters, with objectives (forget, retain).
        warm_up: steps at the beginning in which only the discriminator learns; published: 1000 of 2000.
        retain_target: what the model is compared with on retain prompts: the `noise`, as published, or the output of
            the `frozen` copy, whose gradient is zero at the start and has no noise of its own.

    Source: DoCo, arXiv 2405.15304; github.com/yongliang-wu/DoCo.
    """

    def __init__(
        self,
        unet: nn.Module,
        frozen: nn.Module,
        scheduler: Any,
        optimizer: Optimizer,
        discriminator: nn.Module,
        discriminator_optimizer: Optimizer,
        surgery: GradientSurgery,
        *,
        warm_up: int = 0,
        retain_target: Literal["noise", "frozen"] = "noise",
    ) -> None:
        if retain_target not in ("noise", "frozen"):
            raise ValueError(f"retain_target must be 'noise' or 'frozen', got {retain_target!r}")
        self.unet, self.frozen, self.scheduler, self.optimizer = unet, frozen, scheduler, optimizer
        self.discriminator, self.discriminator_optimizer = discriminator, discriminator_optimizer
        self.surgery, self.warm_up, self.retain_target = surgery, warm_up, retain_target
        self.steps = 0

    def _noisy(self, clean: Tensor, generator: Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        count = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, (len(clean),), generator=generator, device=clean.device)
        noise = torch.randn(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        return self.scheduler.add_noise(clean, noise, timesteps), noise, timesteps

    def _x0(self, model: nn.Module, noisy: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        return predicted_x0(self.scheduler, model(noisy, timesteps, prompts).sample, timesteps, noisy)

    def retain_loss(self, clean: Tensor, prompts: Tensor, generator: Generator | None = None) -> Tensor:
        """The denoising loss of samples that the model shall go on to draw, ()."""
        noisy, noise, timesteps = self._noisy(clean, generator)
        if self.retain_target == "frozen":
            with torch.no_grad():
                wanted = self.frozen(noisy, timesteps, prompts).sample
        else:
            wanted = denoising_target(self.scheduler, clean, noise, timesteps)
        return F.mse_loss(self.unet(noisy, timesteps, prompts).sample, wanted)

    def _teach_discriminator(self, anchor: Tensor, target: Tensor) -> Tensor:
        self.discriminator.requires_grad_(True)
        loss = discriminator_loss(self.discriminator(anchor), self.discriminator(target))
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()
        self.discriminator.requires_grad_(False)
        return loss.detach()

    def step(
        self,
        clean: Tensor,
        target: Tensor,
        anchor: Tensor,
        retain: tuple[Tensor, Tensor],
        generator: Generator | None = None,
    ) -> Found:
        """One update of the discriminator and, after the warm-up, of the model.

        Args:
            clean: (B, C, H, W) samples, such as those of the anchor prompts.
            target: (B, L, D) embedded prompts of the concept to be forgotten.
            anchor: (B, L, D) embedded prompts of what shall come instead.
            retain: samples (R, C, H, W) to keep, with their embedded prompts (R, L, D).
            generator: of noise and timesteps.
        """
        noisy, _, timesteps = self._noisy(clean, generator)
        with torch.no_grad():
            wanted = self._x0(self.frozen, noisy, timesteps, anchor)
        warm = self.steps >= self.warm_up
        self.steps += 1
        with torch.set_grad_enabled(warm):
            drawn = self._x0(self.unet, noisy, timesteps, target)
        taught = self._teach_discriminator(wanted, drawn.detach())
        if not warm:
            return Found(taught)
        with self.surgery.objective("forget"):
            forget = generator_loss(self.discriminator(drawn))
            forget.backward()
        with self.surgery.objective("retain"):
            kept = self.retain_loss(*retain, generator)
            kept.backward()
        return Found(taught, forget.detach(), kept.detach(), self.surgery.step(self.optimizer))

"""Whole models with random weights, a batch for each, and the loss of every sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Job:
    """A model and a batch. `losses(model, *inputs)` is (B,); the batch is the first dimension of each input."""

    make: Callable[[], nn.Module]
    inputs: tuple[Tensor, ...]
    losses: Callable[..., Tensor]
    max_norm: float = 1.0

    def model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The same weights every time, in training mode, without dropout."""
        torch.manual_seed(0)
        model = self.make().to(dtype).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model

    def samples(self) -> list[tuple[Tensor, ...]]:
        """The batch in batches of one."""
        return list(zip(*(x.split(1) for x in self.inputs), strict=True))


def _language_losses(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    logits = model(input_ids=ids, position_ids=positions).logits
    nll = F.cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="none")
    return nll.view_as(ids).mean(1)


def _tokens(B: int, T: int, V: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(0))
    return ids, torch.arange(T).repeat(B, 1)


def gpt2(layers: int, d: int, V: int, T: int, B: int) -> Job:
    """transformers' GPT-2, untied, with explicit positions: what the peers can take."""

    def make() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(
            n_embd=d,
            n_layer=layers,
            n_head=d // 64,
            vocab_size=V,
            n_positions=T,
            attn_implementation="eager",
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
        )
        return GPT2LMHeadModel(config)

    return Job(make, _tokens(B, T, V), _language_losses)


def llama(layers: int, d: int, V: int, T: int, B: int) -> Job:
    """transformers' Llama, untied."""

    def make() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=d,
            intermediate_size=3 * d,
            num_hidden_layers=layers,
            num_attention_heads=d // 64,
            num_key_value_heads=d // 128 or 1,
            vocab_size=V,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
        return LlamaForCausalLM(config)

    return Job(make, _tokens(B, T, V), _language_losses)


def _denoising_losses(model: nn.Module, noisy: Tensor, at: Tensor, noise: Tensor) -> Tensor:
    return (model(noisy, at, return_dict=False)[0] - noise).square().flatten(1).mean(1)


def unet(widths: tuple[int, ...], size: int, B: int) -> Job:
    """diffusers' unconditional UNet, attention in its last blocks."""

    def make() -> nn.Module:
        from diffusers import UNet2DModel

        plain = len(widths) - 1
        return UNet2DModel(
            sample_size=size,
            layers_per_block=1,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
            norm_num_groups=8,
        )

    generator = torch.Generator().manual_seed(0)
    noisy, noise = (torch.randn(B, 3, size, size, generator=generator) for _ in range(2))
    at = torch.randint(0, 1000, (B,), generator=generator)
    return Job(make, (noisy, at, noise), _denoising_losses)

"""Small causal models: one of our own, and those of `transformers` whose heads differ."""

from typing import Any

import torch
from torch import Tensor, nn

V, D = 61, 16


class Tiny(nn.Module):
    """A model with `get_output_embeddings`, a soft-cap and a scale, and attention to what came before."""

    def __init__(self, dtype: torch.dtype = torch.float32, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, D)
        self.mix = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.5)
        self.lm_head = nn.Linear(D, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight
        self.to(dtype)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.embed(input_ids)
        x = x.cumsum(1) / torch.arange(1, x.shape[1] + 1).unsqueeze(-1)
        return (self.lm_head(self.dropout(torch.tanh(self.mix(x.to(self.embed.weight.dtype))))),)


def batches(sizes: tuple[int, ...] = (3, 2), seed: int = 0, padded: int = 9) -> list[dict[str, Any]]:
    """Questions without labels, answers of several lengths with them, padding; indices from 10."""
    generator = torch.Generator().manual_seed(seed)
    found, index = [], 10
    for size in sizes:
        ids = torch.randint(0, V, (size, padded), generator=generator)
        mask = torch.ones_like(ids)
        labels = ids.clone()
        for row in range(size):
            end = padded - row % 4
            labels[row, : 2 + row % 2] = -100
            labels[row, end:] = -100
            mask[row, end:] = 0
        keys = torch.arange(index, index + size)
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels, "index": keys})
        index += size
    return found


def transformers_model(kind: str) -> Any:
    """A model of random weights: `llama`, `gemma2` (soft-cap, tied), `phi` (bias), `cohere`, `granite` (scales)."""
    import transformers

    common = {
        "vocab_size": V, "hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    special: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("Llama", {}),
        "gemma2": ("Gemma2", {"head_dim": 8, "final_logit_softcapping": 0.5}),
        "phi": ("Phi", {}),
        "cohere": ("Cohere", {"logit_scale": 0.25}),
        "granite": ("Granite", {"logits_scaling": 8.0}),
        "gpt2": ("GPT2", {}),
    }
    name, extra = special[kind]
    torch.manual_seed(0)
    if kind == "gpt2":
        common = {
            "vocab_size": V,
            "n_embd": D,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
    config = getattr(transformers, f"{name}Config")(**common, **extra)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if kind == "phi":
        nn.init.normal_(model.lm_head.bias)
    return model

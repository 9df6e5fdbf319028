"""The model under an adapter: its reference for preference losses, and its fingerprint."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

_CHUNK: Final = 1 << 26
_COMPILED: Final = "_orig_mod."
_WRAPPERS: Final = (nn.parallel.DistributedDataParallel, nn.DataParallel)


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[nn.Module]:
    """The model without its adapters: the reference of a LoRA run, which needs no second copy.

    ```
    with adapter_off(model), torch.no_grad():
        rows = hidden_rows(model, batch)  # of the base model
    ```

    Which parameters take gradients is afterwards as it was; PEFT would turn every active adapter's on.

    Args:
        model: a `peft` model, or a `transformers` model with adapters; either also inside DDP.

    Raises:
        ValueError: if there are no adapters, they are merged into the weights (what is under them is then known up to
            rounding only), or they learn a prompt.
    """
    inner: Any = model
    while not _can_switch(inner):
        inner = getattr(inner, "module", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"model must have adapters that can be switched off, got {type(model).__name__}")
    if getattr(getattr(inner, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError("model: adapters that learn a prompt are not supported, only those in layers")
    merged = [name for name, module in inner.named_modules() if getattr(module, "merged_adapters", None)]
    if merged:
        raise ValueError(f"model: adapters are merged into the weights of {merged[0]}; unmerge them first")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if hasattr(inner, "disable_adapter"):
            with inner.disable_adapter():
                yield model
        else:
            inner.disable_adapters()
            try:
                yield model
            finally:
                inner.enable_adapters()
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _can_switch(model: Any) -> bool:
    if hasattr(model, "disable_adapter"):
        return True
    return callable(getattr(model, "disable_adapters", None)) and getattr(
        model, "_hf_peft_config_loaded", False
    )


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights and buffers, saved or not: their names, shapes, dtypes and bits.

    Adapters that are off do not count, and neither do the names that they give to what is under them: a base model
    has one fingerprint before PEFT wraps it and inside `adapter_off`, and before and after `torch.compile`.

    Args:
        model: any module whose tensors have data; of sharded ones (DTensor) every rank must call.

    Returns:
        A SHA-256, in hexadecimal. It takes about a second a GB.

    Raises:
        ValueError: if a tensor has no data.
    """
    bare: Any = model
    while hasattr(bare, "_orig_mod") or isinstance(bare, _WRAPPERS):
        bare = bare._orig_mod if hasattr(bare, "_orig_mod") else bare.module
    digest = hashlib.sha256()
    for name, tensor in sorted(_weights(bare).items()):
        if tensor.is_meta:
            raise ValueError(f"model: {name} is on the meta device and has no data")
        full = _full(tensor)
        digest.update(f"{name}:{full.dtype}:{tuple(full.shape)};".encode())
        flat = full.detach().contiguous().flatten()
        for part in flat.split(_CHUNK):
            digest.update(memoryview(part.cpu().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _full(tensor: Any) -> Tensor:
    gathered: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The state without what is switched off, under the names of the model that PEFT has wrapped."""
    if not any(getattr(module, "disable_adapters", None) is True for module in model.modules()):
        return _tensors(model)
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    kept = _tensors(base)
    for path, module in base.named_modules():
        prefix = path.replace(_COMPILED, "")
        for inner in ("base_layer", "original_module"):
            if isinstance(getattr(module, inner, None), nn.Module):
                kept = _unwrapped(kept, f"{prefix}.", f"{prefix}.{inner}.")
    return kept


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state and the buffers that it leaves out, under the names of what was compiled."""
    found = {name: x for name, x in model.state_dict().items() if isinstance(x, Tensor)}
    for prefix, module in model.named_modules():
        for name in module._non_persistent_buffers_set:
            if isinstance(buffer := module._buffers.get(name), Tensor):
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return {name.replace(_COMPILED, ""): x for name, x in found.items()}


def _unwrapped(state: dict[str, Tensor], outer: str, inner: str) -> dict[str, Tensor]:
    return {
        name.replace(inner, outer, 1) if name.startswith(inner) else name: x
        for name, x in state.items()
        if name.startswith(inner) or not name.startswith(outer)
    }

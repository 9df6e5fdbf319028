"""Which layer a module is: by class where torch has one, by structure where every model brings its own."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from unlearn_kernels.per_sample.modules.conv import ConvLayer, TransposedConvLayer
from unlearn_kernels.per_sample.modules.embedding import EmbeddingLayer
from unlearn_kernels.per_sample.modules.layer import Layer
from unlearn_kernels.per_sample.modules.linear import LinearLayer, TransposedLinearLayer
from unlearn_kernels.per_sample.modules.norm import NormLayer

Maker: TypeAlias = Callable[[str, Any, frozenset[str]], Layer]

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


def recognise(module: nn.Module) -> Maker | str:
    """How to follow `module`, or why there is no way."""
    for classes, maker in _BY_CLASS:
        if isinstance(module, classes):
            base = next(c for c in type(module).__mro__ if c in classes)
            if type(module).forward is not inspect.getattr_static(base, "forward") and not _only_scales(
                module
            ):
                return f"it overrides {base.__name__}.forward"
            return maker(module)
    names = [c.__name__ for c in type(module).__mro__]
    weight = getattr(module, "weight", None)
    if "Conv1D" in names and isinstance(weight, Tensor) and weight.dim() == 2:
        return TransposedLinearLayer
    if any(name.endswith(("RMSNorm", "T5LayerNorm")) for name in names):
        return _rms(module)
    return "there is no kernel for its class"


def _only_scales(module: nn.Module) -> bool:
    """Embeddings that multiply their output by a number: Gemma's, BART's."""
    return isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")


def _embedding(module: Any) -> Maker | str:
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by counts over the whole batch"
    if module.max_norm is not None:
        return "max_norm changes the weight in the forward pass"
    return EmbeddingLayer


def _norm(module: Any, **shape: Any) -> Maker:
    return partial(NormLayer, shape=shape)


def _rms_shape(module: Any, eps: float | None) -> Maker:
    shape = tuple(module.weight.shape)
    return _norm(
        module,
        kind="rms",
        eps=torch.finfo(module.weight.dtype).eps if eps is None else eps,
        normalized_shape=shape,
    )


def _rms(module: Any) -> Maker | str:
    """An RMSNorm of a model's own: tried out, because some have scales that act in other ways."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    eps = next(
        (getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon") if hasattr(module, name)), 0
    )
    if names != {"weight"} or module.weight.dim() != 1 or not isinstance(eps, float):
        return "it is called RMSNorm, but its parameters are not one scale and an epsilon"
    weight = module.weight
    if type(weight) is nn.Parameter and weight.device.type != "meta" and not _scales_rms(module, eps):
        return "it is called RMSNorm, but its output is not the normalised input times its scale"
    return _rms_shape(module, eps)


def _scales_rms(module: nn.Module, eps: float) -> bool:
    weight = module.weight
    assert isinstance(weight, Tensor)
    x = torch.linspace(-1, 2, 2 * weight.numel(), device=weight.device).reshape(1, 2, -1).to(weight.dtype)
    x = x * torch.tensor([[1.0], [0.01]], device=x.device, dtype=x.dtype)
    with torch.no_grad():
        one, two = (functional_call(module, {"weight": torch.full_like(weight, v)}, (x,)) for v in (1.0, 2.0))
    expected = nn.functional.rms_norm(x.double(), (x.shape[-1],), eps=eps)
    return torch.allclose((two - one).double(), expected, rtol=0.05, atol=0.05)


def _layer_norm(module: Any) -> Maker:
    return _norm(module, kind="layer", eps=module.eps, normalized_shape=tuple(module.normalized_shape))


def _group_norm(module: Any) -> Maker:
    return _norm(module, kind="group", eps=module.eps, num_groups=module.num_groups)


def _instance_norm(module: Any) -> Maker | str:
    if module.track_running_stats:
        return "its running statistics mix samples"
    return _norm(module, kind="group", eps=module.eps, num_groups=module.num_features)


_BY_CLASS: list[tuple[tuple[type, ...], Callable[[Any], Maker | str]]] = [
    ((nn.Linear,), lambda module: LinearLayer),
    ((nn.Embedding,), _embedding),
    (_CONVS, lambda module: ConvLayer),
    (_TRANSPOSED, lambda module: TransposedConvLayer),
    ((nn.LayerNorm,), _layer_norm),
    ((nn.RMSNorm,), lambda module: _rms_shape(module, module.eps)),
    ((nn.GroupNorm,), _group_norm),
    (_INSTANCE, _instance_norm),
]

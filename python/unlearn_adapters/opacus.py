"""Opacus on these kernels: `install()`, and `PrivacyEngine` with `grad_sample_mode` "ghost" or "hooks" uses them.

What changes, besides speed: LayerNorm, RMSNorm, GroupNorm, convolutions and transformers' `Conv1D` and RMSNorm
classes no longer have their gradients (B, *shape) formed in "ghost" mode; inputs of more than three dimensions
count; sums of bfloat16 and float16 are taken in float32; an embedding of `[1, T]` positions has one norm a sample.
Weights that two modules share stay refused by Opacus; `unlearn_kernels.per_sample.PerSampleGradients` takes them.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeAlias

from opacus.grad_sample import GradSampleHooks, GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from unlearn_kernels.per_sample.modules.layer import Kept
from unlearn_kernels.per_sample.modules.recognise import recognise
from unlearn_kernels.per_sample.modules.use import Use

Sampler: TypeAlias = Callable[[nn.Module, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]

_CLASSES: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
_before: dict[tuple[type, str], Any] = {}


class _Samplers(dict[type, Sampler]):
    """Opacus's table of a kind of sampler, with ours for the classes that we take."""

    def __init__(self, theirs: dict[type, Sampler], ours: Sampler) -> None:
        super().__init__(theirs)
        self.ours = ours

    def __contains__(self, kind: object) -> bool:
        return _takes(kind) or super().__contains__(kind)

    def __getitem__(self, kind: type) -> Sampler:
        return self.ours if _takes(kind) else super().__getitem__(kind)


def _takes(kind: object) -> bool:
    if not isinstance(kind, type):
        return False
    names = [base.__name__ for base in kind.__mro__]
    own = "Conv1D" in names or any(name.endswith(("RMSNorm", "T5LayerNorm")) for name in names)
    return kind in _CLASSES or own


def _uses(layer: nn.Module, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Use]:
    wanted = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
    maker = recognise(layer)
    if isinstance(maker, str):
        raise ValueError(f"{type(layer).__name__} has no per-sample gradients here: {maker}")
    kept = Kept((activations[0],))
    found = maker(type(layer).__name__, layer, frozenset(wanted)).uses(kept, (backprops,))
    return {wanted[name]: use for name, use in found.items()}


def norm_sampler(
    layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Norms (B,) of the per-sample gradients of a layer's trainable parameters, as Opacus asks for them."""
    return {p: use.sqnorms().sqrt() for p, use in _uses(layer, activations, backprops).items()}


def grad_sampler(
    layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-sample gradients (B, *shape) of a layer's trainable parameters, as Opacus asks for them."""
    return {p: use.grads().to(p.dtype) for p, use in _uses(layer, activations, backprops).items()}


def _expanding(capture: Callable[..., None]) -> Callable[..., Tensor | None]:
    """Opacus's forward hook, after which an embedding of `[1, T]` ids has an output for every sample."""

    @wraps(capture)
    def hook(
        self: Any, module: nn.Module, inputs: tuple[Tensor, ...], output: Any, **kwargs: Any
    ) -> Tensor | None:
        samples = getattr(self, "_unlearn_kernels_samples", 1)
        if isinstance(module, nn.Embedding) and inputs[0].shape[0] == 1 < samples and inputs[0].dim() > 1:
            capture(self, module, (inputs[0].expand(samples, *inputs[0].shape[1:]),), output, **kwargs)
            return output.expand(samples, *output.shape[1:])
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].dim() > 0:
            self._unlearn_kernels_samples = inputs[0].shape[0]
        capture(self, module, inputs, output, **kwargs)
        return None

    return hook


def _replace(owner: type, name: str, value: Any) -> None:
    _before[owner, name] = vars(owner).get(name)
    setattr(owner, name, value)


def install() -> None:
    """Puts these kernels into Opacus's "ghost" and "hooks" modes. A second call does nothing."""
    if _before:
        return
    grads = _Samplers(GradSampleHooks.GRAD_SAMPLERS, grad_sampler)
    norms = _Samplers(GradSampleHooksFastGradientClipping.NORM_SAMPLERS, norm_sampler)
    _replace(GradSampleHooks, "GRAD_SAMPLERS", grads)
    _replace(GradSampleHooksFastGradientClipping, "NORM_SAMPLERS", norms)
    for owner in (GradSampleHooks, GradSampleHooksFastGradientClipping):
        _replace(owner, "capture_activations_hook", _expanding(owner.capture_activations_hook))


def uninstall() -> None:
    """Puts back what `install` replaced."""
    while _before:
        (owner, name), value = _before.popitem()
        setattr(owner, name, value)

"""RMU: activations of an inner layer, steered to a random direction. No head, no vocabulary, no layers above."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_kernels.token_loss._models import unwrapped


def control_vector(
    d: int,
    *,
    steering: float = 2.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""The direction that RMU steers forget activations to, `steering * u / |u|`, `u` uniform in [0, 1)^d.

    Args:
        d: its length.
        steering: its norm.
        generator: where the draw comes from, on `device`.
        dtype: of the result; the draw is in float32.
        device: of the result.

    Returns:
        (d,).

    Raises:
        ValueError: if `d` is not positive.

    Source: Li et al. 2024 (WMDP, arXiv 2403.03218), as in open-unlearning's `rmu.py`.
    """
    if d < 1:
        raise ValueError(f"d must be positive, got {d}")
    u = torch.rand(d, generator=generator, device=device)
    return (steering * u / u.norm()).to(dtype)


def rmu(activations: Tensor, target: Tensor, mask: Tensor | None = None, *, fixed: bool = False) -> Tensor:
    r"""RMU's activation loss: the mean squared distance of each sequence's tokens from a target.

    .. math:: \frac{1}{B} \sum_s \frac{1}{n_s} \sum_t m_{st} \frac{1}{d} |a_{st} - c_{st}|^2, \qquad n_s = \sum_t m_{st}

    For the forget batch the target is `control_vector`, for the retain batch the frozen model's activations.

    Args:
        activations: (B, T, d).
        target: of a shape that broadcasts to theirs; a constant.
        mask: which tokens count, (B, T); all without.
        fixed: leave sequences that have no such token out, instead of the source's 0 / 0 = NaN.

    Returns:
        A scalar in the dtype of the activations, float32 for half types.

    Raises:
        ValueError: if shapes do not fit.

    Scratch: one tensor of the activations' size for backward.

    Source: Li et al. 2024 (WMDP, arXiv 2403.03218), as in open-unlearning's `compute_activation_loss`.
    """
    if activations.dim() != 3:
        raise ValueError(f"activations must have shape (B, T, d), got {tuple(activations.shape)}")
    try:
        fits = torch.broadcast_shapes(target.shape, activations.shape) == activations.shape
    except RuntimeError:
        fits = False
    if not fits:
        shapes = tuple(activations.shape), tuple(target.shape)
        raise ValueError(f"target must be broadcastable to activations {shapes[0]}, got {shapes[1]}")
    mask = activations.new_ones(activations.shape[:2]) if mask is None else mask
    if mask.shape != activations.shape[:2]:
        raise ValueError(f"mask must have shape {tuple(activations.shape[:2])}, got {tuple(mask.shape)}")
    wide = torch.promote_types(activations.dtype, torch.float32)
    kept = mask.to(wide)
    distance = (activations.to(wide) - target.detach().to(wide)).square().mean(-1)
    sums, counts = (distance * kept).sum(1), kept.sum(1)
    if not fixed:
        return (sums / counts).mean()
    present = counts > 0
    means = sums / torch.where(present, counts, 1)
    return torch.where(present, means, 0.0).sum() / present.sum().clamp_min(1)


@dataclass
class Exited:
    """What a model returns that was left early: no logits, no loss.

    Attributes:
        hidden: the layer's output.
    """

    hidden: Any

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"the forward ended at a layer under early_exit: there is no {name}, only hidden"
        )


class _Exit(Exception):  # noqa: N818 - no error
    """Leaves a forward with a layer's output."""


@contextmanager
def early_exit(model: nn.Module, layer: nn.Module | str | int) -> Iterator[None]:
    """Ends every forward of a model after a layer, whose output is all that RMU asks for.

        with early_exit(model, "model.layers.7"):
            hidden = model(**inputs).hidden  # or whatever a forward hook on the layer keeps

    Hooks of the layer run as always, whenever they were registered, with the same bits, and so do gradients. The
    layers above cost neither time nor memory; those below take no backward if their parameters, embeddings among them,
    are frozen while the forward runs. Under DDP give `find_unused_parameters=True`, because the layers above get no
    gradient. A forward that does not come to the layer ends as it would.

    Args:
        model: whose forward is called, or a wrapper with that model as `module`.
        layer: of it: a module, its name, or its number in the longest `nn.ModuleList`.

    Yields:
        Nothing. In the context the model returns `Exited`.

    Raises:
        ValueError: if the model has no such layer.

    Source: Li et al. 2024 (WMDP, arXiv 2403.03218), whose code runs the whole model for an inner layer's output.
    """
    model = unwrapped(model)
    target, before, forward = _layer(model, layer), vars(model).get("forward"), model.forward

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        raise _Exit(output[0] if isinstance(output, tuple) else output)

    def shortened(*args: Any, **kwargs: Any) -> Any:
        # Registered last, so that hooks of others come first.
        with target.register_forward_hook(leave):
            try:
                return forward(*args, **kwargs)
            except _Exit as left:
                return Exited(left.args[0])

    model.forward = shortened
    try:
        yield
    finally:
        del model.forward
        if before is not None:
            model.forward = before


def _layer(model: nn.Module, layer: nn.Module | str | int) -> nn.Module:
    names = dict(model.named_modules())
    if isinstance(layer, str) and layer in names:
        return names[layer]
    if isinstance(layer, int):
        lists = [m for m in names.values() if isinstance(m, nn.ModuleList)]
        longest = max(lists, key=len, default=nn.ModuleList())
        if -len(longest) <= layer < len(longest):
            return longest[layer]
    if isinstance(layer, nn.Module) and any(m is layer for m in names.values()):
        return layer
    what = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
    raise ValueError(f"layer must be a module of the model, its name or its number, got {what}")

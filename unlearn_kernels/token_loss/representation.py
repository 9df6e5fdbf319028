"""RMU: activations of an inner layer, steered to a random direction. No head, no vocabulary."""

import torch
from torch import Tensor


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
        target: broadcastable to them; a constant.
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
        torch.broadcast_shapes(target.shape, activations.shape)
    except RuntimeError:
        shapes = tuple(activations.shape), tuple(target.shape)
        raise ValueError(
            f"target must be broadcastable to activations {shapes[0]}, got {shapes[1]}"
        ) from None
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

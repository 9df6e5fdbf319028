"""Rules that look at one element of two gradients at a time, in plain formulas."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels.reference.influence import philox4x32
from unlearn_kernels.reference.surgery_rules import AGEM, GRADDROP, KEEP_RETAIN, PCGRAD, Options


def opposite(f: Tensor, r: Tensor) -> Tensor:
    """Where the signs differ; zeros and NaN have none. Not `f r < 0`, which underflows."""
    return f.sign() * r.sign() < 0


def uniforms(seed: int, first: int, count: int) -> Tensor:
    """Numbers in [0, 1) of the elements from `first`, a multiple of 4, on: (count,) float32.

    The upper 24 bits of word i % 4 of the Philox call with counter (i / 4 mod 2^32, i / 2^34, 0, 0).
    """
    counter = torch.arange(first // 4, first // 4 + (count + 3) // 4)
    zero = torch.zeros_like(counter)
    words = torch.stack(philox4x32((counter & 0xFFFFFFFF, counter >> 32, zero, zero), seed), dim=-1)
    return (words.flatten()[:count] >> 8).float() * 2.0**-24


def _signs(f: Tensor, r: Tensor, rule: int, options: Options, flags: int) -> Tensor:
    clash = 0.0 if rule == PCGRAD else options.alpha
    kept = options.gamma * f
    if options.alpha != 0 and (rule in (AGEM, PCGRAD) or flags & KEEP_RETAIN):
        kept = kept + options.alpha * r
    return torch.where(opposite(f, r), clash * r, kept)


def _drop(f: Tensor, r: Tensor, options: Options, u: Tensor) -> Tensor:
    positive = 0.5 + 0.5 * ((f + r) / (f.abs() + r.abs()))

    def kept(x: Tensor, leak: float) -> Tensor:
        chosen = ((x > 0) & (positive > u)) | ((x < 0) & (positive <= u))
        return torch.where(chosen, 1.0, leak) * x

    return kept(f, options.leak_forget) + kept(r, options.leak_retain)


def project_elements_(
    forget: Sequence[Tensor], retain: Sequence[Tensor], rule: int, options: Options, flags: int, seed: int
) -> Tensor:
    """Writes `forget`; returns the share of opposite signs of each tensor, (N,) float64."""
    rates, first = [], 0
    for f, r in zip(forget, retain, strict=True):
        # The published loops compute in the gradients' type; half types round once instead.
        wide = torch.float64 if torch.float64 in (f.dtype, r.dtype) else torch.float32
        x, y = f.to(wide), r.to(wide)
        rates.append(opposite(x, y).double().sum() / max(f.numel(), 1))
        if rule == GRADDROP:
            u = uniforms(seed, first, f.numel()).view(f.shape).to(x)
            f.copy_(_drop(x, y, options, u))
        else:
            f.copy_(_signs(x, y, rule, options, flags))
        first += (f.numel() + 3) // 4 * 4
    return torch.stack(rates)

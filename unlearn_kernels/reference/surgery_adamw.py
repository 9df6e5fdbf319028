"""AdamW on a weighted sum of gradients, in plain formulas in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def _step(
    state: Sequence[Tensor], gradients: Sequence[Tensor], weights: Tensor, group: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What parameter, exp_avg and exp_avg_sq become; `state` has the step after them, already counted."""
    p, m, v = (x.double() for x in state[:3])
    lr, beta1, beta2, eps, weight_decay, sign = group.double()
    step = state[3].double()
    g = sign * sum(w * x.double() for w, x in zip(weights.double(), gradients, strict=True) if w != 0)
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    root = (v / (1 - beta2**step)).sqrt()
    return (1 - lr * weight_decay) * p - lr / (1 - beta1**step) * m / (root + eps), m, v


def stochastically(x: Tensor, seed: int, place: int, step: int) -> Tensor:
    """float32 rounded to bfloat16 up or down, the nearer the likelier, by Philox4x32-10.

    Elements `8 c ... 8 c + 7`, in the order of memory, take their 16 bits from counter `(c, c >> 32, place, step)`,
    two from a word, the lower half first.
    """
    flat = x.float().reshape(-1)
    words = _philox(torch.arange((flat.numel() + 7) // 8), seed, place, step)
    halves = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(-1)[: flat.numel()]
    bits = flat.view(torch.int32).long() & 0xFFFFFFFF
    rounded = (bits + halves) & 0xFFFF0000
    rounded = torch.where(rounded >= 1 << 31, rounded - (1 << 32), rounded).int().view(torch.float32)
    return torch.where(flat.isfinite(), rounded, flat).to(torch.bfloat16).view(x.shape)


def _philox(counters: Tensor, seed: int, place: int, step: int) -> Tensor:
    """(n, 4) words of 32 bits, one row a counter."""
    low = 0xFFFFFFFF
    a, b = counters & low, counters >> 32
    c, d = torch.full_like(a, place & low), torch.full_like(a, step & low)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = _wide(a, 0xD2511F53), _wide(c, 0xCD9E8D57)
        a, b, c, d = p1[0] ^ b ^ k0, p1[1], p0[0] ^ d ^ k1, p0[1]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([a, b, c, d], dim=-1)


def _wide(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower words of a product of 32-bit numbers, from halves that int64 can multiply."""
    low, high = (x & 0xFFFF) * factor, (x >> 16) * factor
    middle = high + (low >> 16)
    return middle >> 16, (middle & 0xFFFF) << 16 | low & 0xFFFF


def surgical_adamw_(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Tensor,
    groups: Tensor,
    group_of: Sequence[int],
    stochastic: bool,
    seed: int,
) -> None:
    """AdamW with `g = sign * sum_k w_k g_k`; nothing where a weight is not finite. `groups` has a row
    `(lr, beta1, beta2, eps, weight_decay, sign)` a group."""
    if not params or not bool(weights.isfinite().all()):
        return
    n = len(params)
    for i, state in enumerate(zip(params, exp_avgs, exp_avg_sqs, steps, strict=True)):
        state[3].add_(1)
        made = _step(state, gradients[i::n], weights, groups[group_of[i]])
        if stochastic and state[0].dtype == torch.bfloat16:
            state[0].copy_(stochastically(made[0], seed, i, int(state[3])))
        else:
            state[0].copy_(made[0])
        for moment, value in zip(state[1:3], made[1:], strict=True):
            moment.copy_(value)

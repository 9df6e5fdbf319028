"""The loops of GRU, DoCo and BLUR in their own shape, and with two lines changed: the same parameters."""

import pytest
import torch
from torch import Tensor, nn

from unlearn_kernels import surgery
from unlearn_kernels.testing import randn, relative_error

STEPS, MOMENTUM, COMPAT = 4, 0.4, {"rule": "doco", "compat": True}


class Setup:
    """A small model in float64 whose two losses fight, and batches for every step."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).double()
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(self.parameters, lr=0.2)

    def gradient(self, part: str, step: int) -> list[Tensor]:
        """Of one loss, left in `.grad` and returned."""
        self.optimizer.zero_grad()
        sign = -0.7 if part == "forget" else 1.0
        inputs = randn(5, 6, seed=2 * step + (part == "retain"), dtype=torch.float64)
        (sign * (self.model(inputs) - 1).square().mean()).backward()
        return [p.grad.clone() for p in self.parameters]

    def put(self, gradients: list[Tensor]) -> None:
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.parameters])


def flatten(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients])


def restore(flat: Tensor, likes: list[Tensor]) -> list[Tensor]:
    parts = flat.split([x.numel() for x in likes])
    return [part.view_as(x) for part, x in zip(parts, likes, strict=True)]


def gru_before(clip: float | None) -> tuple[Tensor, int]:
    setup, average, conflicts = Setup(), None, 0
    for step in range(STEPS):
        retain = flatten(setup.gradient("retain", step))
        forget = setup.gradient("forget", step)
        average = MOMENTUM * retain + (1 - MOMENTUM) * (
            torch.zeros_like(retain) if average is None else average
        )
        flat = flatten(forget)
        if (dot := flat @ average) < 0:
            conflicts += 1
            ratio = dot / (average @ average)
            if clip is not None:
                cosine = dot / (flat.norm() * average.norm())
                ratio = flat.norm() * max(cosine, -clip) / average.norm()
            flat = flat - ratio * average
        setup.put(restore(flat, forget))
        setup.optimizer.step()
    return setup.weights(), conflicts


def gru_after(clip: float | None) -> tuple[Tensor, int]:
    setup, conflicts = Setup(), 0
    average = [torch.zeros_like(p) for p in setup.parameters]
    for step in range(STEPS):
        retain = setup.gradient("retain", step)
        forget = setup.gradient("forget", step)
        surgery.combine_([average, retain], [1 - MOMENTUM, MOMENTUM])
        found = surgery.project_conflict_(forget, average, rule="gru", cosine_clip=clip)
        conflicts += int(found.cosine < 0)
        setup.put(forget)
        setup.optimizer.step()
    return setup.weights(), conflicts


@pytest.mark.parametrize("clip", [None, 0.5])
def test_gru(clip):
    (before, conflicts), (after, found) = gru_before(clip), gru_after(clip)
    assert conflicts == found > 0
    assert relative_error(after, before) < 1e-12


def doco_before(norm: float | None, lam: float) -> Tensor:
    setup = Setup()
    for step in range(STEPS):
        setup.gradient("retain", step)
        if norm is not None:
            nn.utils.clip_grad_norm_(setup.parameters, norm)
        kept = [p.grad.clone() for p in setup.parameters]
        setup.gradient("forget", step)
        if norm is not None:
            nn.utils.clip_grad_norm_(setup.parameters, norm)
        for p, b in zip(setup.parameters, kept, strict=True):
            unit_a, unit_b = (x / (x.norm() + 1e-8) for x in (p.grad, b))
            cosine = (unit_a * unit_b).sum()
            if cosine < 0:
                p.grad = p.grad - lam * cosine * unit_b
        setup.optimizer.step()
    return setup.weights()


def doco_after(norm: float | None, **options) -> Tensor:
    setup = Setup()
    for step in range(STEPS):
        kept = setup.gradient("retain", step)
        setup.gradient("forget", step)
        surgery.project_conflict_([p.grad for p in setup.parameters], kept, max_norm=norm, **options)
        setup.optimizer.step()
    return setup.weights()


@pytest.mark.parametrize("norm", [None, 0.3])
@pytest.mark.parametrize("lam", [1.0, 0.5])
def test_doco(norm, lam):
    before = doco_before(norm, lam)
    assert relative_error(doco_after(norm, **COMPAT, lam=lam), before) < 1e-12
    assert relative_error(doco_after(norm, rule="doco", lam=lam), before) > 1e-3


def blur_before(gamma: float) -> Tensor:
    setup = Setup()
    for step in range(STEPS):
        forget, retain = (setup.gradient(part, step) for part in ("forget", "retain"))
        dot = sum((f * r).sum() for f, r in zip(forget, retain, strict=True))
        square = sum((f * f).sum() for f in forget)
        setup.put([r + (gamma - dot / square) * f for f, r in zip(forget, retain, strict=True)])
        setup.optimizer.step()
    return setup.weights()


def blur_after(gamma: float) -> Tensor:
    setup = Setup()
    for step in range(STEPS):
        forget, retain = (setup.gradient(part, step) for part in ("forget", "retain"))
        surgery.project_conflict_(forget, retain, rule="blur", gamma=gamma)
        setup.put(forget)
        setup.optimizer.step()
    return setup.weights()


@pytest.mark.parametrize("gamma", [1.0, 0.25])
def test_blur(gamma):
    assert relative_error(blur_after(gamma), blur_before(gamma)) < 1e-12

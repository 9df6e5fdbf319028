"""Rules that go through the pairs of gradients and add to one a part of the other."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from unlearn_kernels.surgery.rules.rule import Rule, diagonal, inverse


@dataclass(eq=False)
class _Pairwise(Rule):
    """Visits every ordered pair (i, j) once; for each i the order of the j's is fixed or drawn.

    The rows of `C` (..., K, K) are the changed gradients in terms of the given ones. At one step every row looks
    at its own j, so that K steps do, each of a few launches.
    """

    generator: torch.Generator | None = None

    def _orders(self, K: int, device: torch.device) -> Tensor:
        """(K, K), a row of every i: the j's, among them i itself."""
        if self.generator is None:
            return torch.arange(K, device=device).expand(K, K)
        drawn = torch.stack([self._draw(i, K) for i in range(K)])
        return drawn.to(device, non_blocking=True)

    def _draw(self, i: int, K: int) -> Tensor:
        return torch.randperm(K, generator=self.generator)

    def solve(self, gramian: Tensor) -> Tensor:
        """The column sums of `C` after all visits."""
        K = gramian.shape[-1]
        C = torch.eye(K, dtype=gramian.dtype, device=gramian.device).expand_as(gramian).clone()
        rows = torch.arange(K, device=gramian.device)
        for js in self._orders(K, gramian.device).T:
            added = self._visit(gramian, C, rows, js)
            C[..., rows, js] += torch.where(rows == js, 0.0, added)
        return C.sum(-2)

    def _visit(self, gramian: Tensor, C: Tensor, rows: Tensor, js: Tensor) -> Tensor:
        """How much of `g_j` every row gets, (..., K)."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """The generator's state, if there is one."""
        return {} if self.generator is None else {"generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Draws on as the other would have."""
        super().load_state_dict(state)
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())


@dataclass(eq=False)
class PCGrad(_Pairwise):
    r"""Each gradient is projected to the normal plane of every other that it conflicts with. No wait on CUDA.

    .. math:: g_i' \leftarrow g_i' - \min(0, \langle g_i', g_j \rangle) / \|g_j\|^2 \, g_j
        \quad (j \ne i), \qquad g = \sum_i g_i'

    Args:
        generator: a CPU generator that draws, for every i, the order of the j's, as published. None takes them
            in the given order, the same on every process. With two gradients the order is of no account.

    Source: Yu et al. 2020 (arXiv 2001.06782), algorithm 1.
    """

    name: ClassVar[str] = "pcgrad"

    def _visit(self, gramian: Tensor, C: Tensor, rows: Tensor, js: Tensor) -> Tensor:
        dot = (C * gramian[..., js, :]).sum(-1)
        return -dot.clamp(max=0) * inverse(diagonal(gramian)[..., js])

    def in_one_call(self) -> dict[str, Any]:
        """`pcgrad`; of two gradients there is one order."""
        return {"rule": "pcgrad"}


@dataclass(eq=False)
class GradVac(_Pairwise):
    r"""Raises the cosine of every pair to a moving average of what it was. Has a memory. No wait on CUDA.

    With `\phi` the cosine of `g_i'` and `g_j` and `\hat\phi_{ij}` its target, where `\phi < \hat\phi_{ij}`

    .. math:: g_i' \leftarrow g_i' + \frac{\|g_i'\| (\hat\phi \sqrt{1 - \phi^2} - \phi \sqrt{1 - \hat\phi^2})}
        {\|g_j\| \sqrt{1 - \hat\phi^2}} g_j, \qquad
        \hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi

    Targets start at 0, and do not move at a step whose Gramian is not finite.

    Args:
        generator: as PCGrad's.
        beta: how fast targets move, in [0, 1]. The paper has 0.01, the multi-task libraries 0.5.

    Attributes:
        targets: (..., K, K) float64, or None before the first call.

    Raises:
        ValueError: if `beta` is out of range.

    Source: Wang et al. 2021 (arXiv 2010.05874), equations 1 and 2.
    """

    name: ClassVar[str] = "gradvac"
    beta: float = 0.5
    targets: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta must be between 0 and 1, got {self.beta}")

    def __call__(self, gramian: Tensor) -> Tensor:
        """The weights; targets move where the Gramian is finite."""
        before = self.targets
        if before is None or before.shape != gramian.shape:
            before = torch.zeros(gramian.shape, dtype=torch.float64, device=gramian.device)
        self.targets = before.to(gramian.device, copy=True)
        found = super().__call__(gramian)
        bad = found.isnan().any(-1)[..., None, None]
        self.targets = torch.where(bad, before.to(gramian.device), self.targets)
        return found

    def _draw(self, i: int, K: int) -> Tensor:
        others = torch.tensor([j for j in range(K) if j != i] + [i])
        return others[torch.cat([torch.randperm(K - 1, generator=self.generator), torch.tensor([K - 1])])]

    def _visit(self, gramian: Tensor, C: Tensor, rows: Tensor, js: Tensor) -> Tensor:
        assert self.targets is not None
        products = C @ gramian
        norm = (products * C).sum(-1).clamp(min=0).sqrt()
        other = diagonal(gramian)[..., js].sqrt()
        cosine = (products[..., rows, js] * inverse(norm) * inverse(other)).clamp(-1, 1)
        target = self.targets[..., rows, js]
        sine, sine_of_target = ((1 - x * x).clamp(min=0).sqrt() for x in (cosine, target))
        raised = norm * (target * sine - cosine * sine_of_target)
        raised = raised * inverse(other) / sine_of_target.clamp(min=1e-8)
        moved = torch.where(rows == js, target, torch.lerp(target, cosine, self.beta))
        self.targets[..., rows, js] = moved
        return torch.where(cosine < target, raised, 0.0)

    def reset(self) -> None:
        """Targets start at 0 again."""
        self.targets = None

    def state_dict(self) -> dict[str, Any]:
        """The targets, and the generator's state if there is one."""
        return {**super().state_dict(), "targets": self.targets}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over targets and generator."""
        super().load_state_dict(state)
        targets = state["targets"]
        self.targets = None if targets is None else targets.clone()

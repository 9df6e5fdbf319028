"""Moving averages that stand for the gradients of some objectives."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unlearn_kernels._backends import Backend
from unlearn_kernels.surgery._step import Gradients, matched
from unlearn_kernels.surgery.combine import combine_


class Averages:
    """`r <- (1 - m) r + m r_new` for some objectives, begun with the first `r_new`.

    A new gradient may be scaled by a GradScaler; averages are not, so that its scale may change.

    Args:
        objectives: all of them.
        shares: `m` of some.
        backend: of `combine_`.

    Raises:
        ValueError: for what is no objective, or `m` outside (0, 1].
    """

    def __init__(
        self, objectives: Sequence[str], shares: Mapping[str, float], backend: Backend | None
    ) -> None:
        for name, m in shares.items():
            if name not in objectives:
                raise ValueError(f"ema must name objectives of {tuple(objectives)}, got {name!r}")
            if not 0 < m <= 1:
                raise ValueError(f"ema[{name!r}] must be above 0 and at most 1, got {m}")
        self.objectives, self.shares, self.backend = tuple(objectives), dict(shares), backend
        self.values: dict[str, Gradients] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.shares

    def __bool__(self) -> bool:
        return bool(self.shares)

    def sources(self, held: Sequence[Gradients], scale: float) -> tuple[list[Gradients], Tensor]:
        """The gradients to take a Gramian of, and the matrix (K, sources) that makes the objectives' of them."""
        K = len(held)
        sources, T = list(held), torch.eye(K, dtype=torch.float64) / scale
        for k, name in enumerate(self.objectives):
            if name in self.values:
                sources.append(self.values[name])
                m = self._share(name, held[k])
                T = torch.nn.functional.pad(T, (0, 1))
                T[k, k], T[k, -1] = m / scale, 1 - m
        return sources, T

    def _share(self, name: str, new: Gradients) -> float:
        """An objective that had no `backward()` keeps its average."""
        return self.shares[name] if any(g is not None for g in new) else 0.0

    def moved(self, held: Sequence[Gradients], scale: float, *, finite: bool) -> list[Gradients]:
        """The objectives' gradients, with the averages in place of some; these have moved if all was finite."""
        if finite:
            for name, new in zip(self.objectives, held, strict=True):
                if name in self.values:
                    self.values[name] = self._next(name, new, scale)
                elif name in self.shares:
                    self.values[name] = self._begun(new, scale)
        return [self.values.get(name, new) for name, new in zip(self.objectives, held, strict=True)]

    def _begun(self, new: Gradients, scale: float) -> Gradients:
        there = [g for g in new if g is not None]
        if scale != 1:
            combine_([matched(there, there)], [1 / scale], backend=self.backend)
        return list(new)

    def _next(self, name: str, new: Gradients, scale: float) -> Gradients:
        m = self._share(name, new)
        if m == 0:
            return self.values[name]
        pairs = zip(self.values[name], new, strict=True)
        found = [torch.zeros_like(n) if v is None and n is not None else v for v, n in pairs]
        values = [v for v in found if v is not None]
        news = [n for v, n in zip(found, new, strict=True) if v is not None]
        sets = [matched(values, values), matched(news, values)]
        combine_(sets, [1 - m, m / scale], backend=self.backend)
        return found

    def units(self, scale: float) -> Tensor:
        """What the objectives' weights are multiplied by, so that the sum is scaled like new gradients, (K,)."""
        return torch.tensor(
            [scale if n in self.values else 1.0 for n in self.objectives], dtype=torch.float64
        )

    def state_dict(self) -> dict[str, Any]:
        """The averages, each a list with a place for every parameter."""
        return {name: list(values) for name, values in self.values.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over copies of another's averages.

        Raises:
            ValueError: if they are of other objectives.
        """
        unknown = set(state) - set(self.shares)
        if unknown:
            raise ValueError(f"averages must be of {sorted(self.shares)}, got {sorted(unknown)} too")
        self.values = {name: [None if x is None else x.clone() for x in xs] for name, xs in state.items()}

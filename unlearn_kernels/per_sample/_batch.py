"""The per-sample gradients of one batch through a whole model, and the verbs over them."""

from collections import Counter
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample._parallel import Parallel
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.per_sample.modules.use import Use, combined, dots

By: TypeAlias = Literal["sample", "parameter"]
Projections: TypeAlias = Mapping[str, Projection | TwoSided] | Projection
UNKNOWN: Final = -1
Parameters: TypeAlias = Mapping[str, torch.nn.Parameter]


class Batch:
    """Per-sample gradients of the model, by parameter, in the forms in which its layers left them.

    Args:
        parameters: what is followed, under the names of the model.
        parallel: how the model is spread over processes.
        mean: whether the loss is the mean over the samples.
    """

    def __init__(self, parameters: Parameters, parallel: Parallel, mean: bool) -> None:
        self.parameters, self.parallel, self.mean = parameters, parallel, mean
        self.samples = UNKNOWN
        self.calls: Counter[str] = Counter()
        self.answered = False
        self._uses: dict[str, list[Use]] = {}
        self._released = False

    def add(self, name: str, use: Use) -> None:
        """Takes the gradients of one more use of a parameter."""
        self._uses.setdefault(name, []).append(use)

    def has(self, name: str) -> bool:
        """Whether the parameter has been used."""
        return name in self._uses

    @property
    def scale(self) -> float:
        """What the backward's gradients are multiplied by, to be gradients of the samples' losses."""
        return float(self.samples) if self.mean else 1.0

    def uses(self) -> dict[str, Use]:
        """Every used parameter's gradients."""
        if self._released:
            raise RuntimeError(
                "the batch's factors were released: pass release=False to weighted_sum_ or clip_"
            )
        if not self._uses:
            raise RuntimeError(
                "no gradients yet: run a forward and a backward of the model inside the context"
            )
        for name, parts in self._uses.items():
            if len(parts) > 1:
                self._uses[name] = [combined(parts)]
        return {name: parts[0] for name, parts in self._uses.items()}

    def unused(self) -> list[str]:
        """Parameters that no backward has reached."""
        return [name for name in self.parameters if name not in self._uses]

    def sqnorms(self, by: By) -> Tensor | dict[str, Tensor]:
        uses = self.uses()
        if by not in ("sample", "parameter"):
            raise ValueError(f"by must be 'sample' or 'parameter', got {by!r}")
        table = torch.stack([use.sqnorms().double() for use in uses.values()]) * self.scale**2
        dtype = self._dtype(uses)
        if by == "sample":
            return self.parallel.summed(table, list(uses)).to(dtype)
        rows = self.parallel.completed(table, list(uses)).to(dtype)
        found = dict(zip(uses, rows, strict=True))
        zeros = torch.zeros_like(rows[0])
        return {name: found.get(name, zeros) for name in self.parameters}

    def _dtype(self, uses: Mapping[str, Use]) -> torch.dtype:
        double = any(self.parameters[name].dtype == torch.float64 for name in uses)
        return torch.float64 if double else torch.float32

    def dots(self, other: "Batch", summed: bool) -> Tensor:
        mine, theirs = self.uses(), other.uses()
        names = [name for name in mine if name in theirs]
        if not names:
            raise ValueError("other has no parameter in common with this batch")
        table = torch.stack([dots(mine[name], theirs[name], summed).double() for name in names])
        return self.parallel.summed(table * (self.scale * other.scale), names).to(self._dtype(mine))

    def grads(self) -> dict[str, Tensor]:
        self._whole("grads")
        return {name: use.grads() * self.scale for name, use in self.uses().items()}

    def project(self, projection: Projections) -> Tensor | dict[str, Tensor]:
        self._whole("project")
        uses = self.uses()
        if isinstance(projection, Projection):
            return self._project_whole(uses, projection)
        unknown = [name for name in projection if name not in self.parameters]
        if unknown:
            raise ValueError(f"projection names no followed parameter: {', '.join(unknown)}")
        return {name: uses[name].project(p) * self.scale for name, p in projection.items() if name in uses}

    def _whole(self, verb: str) -> None:
        if self.parallel.parts:
            raise ValueError(
                f"{verb} does not go with tensor_parallel: a process has a part of each gradient"
            )

    def _project_whole(self, uses: Mapping[str, Use], projection: Projection) -> Tensor:
        """Parameter after parameter: never a gradient of the whole model."""
        total = sum(p.numel() for p in self.parameters.values())
        if projection.dim != total:
            raise ValueError(
                f"projection must have dim {total}, all followed parameters, got {projection.dim}"
            )
        device, offset = next(iter(uses.values())).device, 0
        out = torch.zeros(self.samples, projection.k, dtype=torch.float64, device=device)
        for name, p in self.parameters.items():
            if name in uses:
                out += uses[name].project_part(projection, offset).to(device)
            offset += p.numel()
        return (out * self.scale).to(self._dtype(uses))

    @torch.no_grad()
    def weighted_sum_(self, w: Tensor, *, release: bool) -> None:
        """Adds `sum_i w_i g_i` to every parameter's `.grad`."""
        if w.shape != (self.samples,):
            raise ValueError(f"w must have shape ({self.samples},), got {tuple(w.shape)}")
        weights = w.detach() * self.scale
        sums = {
            name: lambda use=use: use.weighted_sum(weights.to(use.device))
            for name, use in self.uses().items()
        }
        self._released = self._released or release
        self.parallel.accumulate(sums, self._release if release else lambda name: None)

    def _release(self, name: str) -> None:
        self._uses.pop(name)

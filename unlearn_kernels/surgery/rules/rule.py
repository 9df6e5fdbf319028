"""What every rule is: a callable that turns a Gramian into weights."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor


class Rule(ABC):
    """Weights (..., K) float64 from a Gramian (..., K, K).

    A rule is a small object that holds its options, and, where the published rule has a memory, that memory.
    Calling it checks the Gramian, converts it to float64 and answers NaN weights for a Gramian with a NaN or an
    infinity, so that a subclass's `solve` sees finite numbers only. Nothing is differentiable.

    Attributes:
        name: what `weights` and the registry know it as.
        sets: how many gradients it takes; None for any number. Rules of two take (forget, retain).
        waits: whether a CUDA Gramian makes the host wait, because a step of the solution needs the host.
        one_sided: whether the first gradient is all that is changed, so that a parameter without one is left out.
    """

    name: ClassVar[str]
    sets: ClassVar[int | None] = None
    waits: ClassVar[bool] = False
    one_sided: ClassVar[bool] = False

    @torch.no_grad()
    def __call__(self, gramian: Tensor) -> Tensor:
        """The weights.

        Args:
            gramian: (..., K, K) floating point, symmetric; leading dimensions are independent problems.

        Returns:
            (..., K) float64 on the device of `gramian`.

        Raises:
            ValueError: if the Gramian is not square or floating point, or its K is not what the rule takes.
        """
        G = _checked(gramian, self)
        finite = G.isfinite().flatten(-2).all(-1)[..., None]
        # Where a decomposition would raise, or a loop not end, it is given the identity instead.
        identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
        found = self.solve(torch.where(finite[..., None], G, identity))
        return torch.where(finite, found, torch.nan)

    @abstractmethod
    def solve(self, gramian: Tensor) -> Tensor:
        """The weights (..., K) of a finite float64 Gramian (..., K, K)."""

    def in_one_call(self) -> dict[str, Any] | None:
        """The rule for two gradients in the words of `project_conflict_`, if that knows it."""
        return None

    def reset(self) -> None:  # noqa: B027 # most rules have no memory, and say so by not overriding this
        """Forgets what earlier calls left."""

    def state_dict(self) -> dict[str, Any]:
        """The rule's memory; empty for most."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over another's memory.

        Raises:
            ValueError: if the memory is not of such a rule.
        """
        if set(state) != set(self.state_dict()):
            known = sorted(self.state_dict())
            raise ValueError(f"state of {self.name} must have the keys {known}, got {sorted(state)}")


def _checked(gramian: Tensor, rule: Rule) -> Tensor:
    if not gramian.is_floating_point():
        raise ValueError(f"gramian must be of a floating-point dtype, got {gramian.dtype}")
    shape = tuple(gramian.shape)
    if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] == 0:
        raise ValueError(f"gramian must have shape (..., K, K), got {shape}")
    if rule.sets not in (None, shape[-1]):
        raise ValueError(
            f"gramian must be {rule.sets} x {rule.sets} for the rule {rule.name!r}, got shape {shape}"
        )
    return gramian.detach().double()


def at_least(name: str, value: float, least: float) -> None:
    """Raises ValueError unless `value >= least`."""
    if not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def row(gramian: Tensor, values: Sequence[float] | None, default: float, name: str) -> Tensor:
    """One number a set, (K,) float64 on the Gramian's device; the host does not wait for the copy.

    Raises:
        ValueError: if there are not K `values`.
    """
    K = gramian.shape[-1]
    if values is None:
        return gramian.new_full((K,), default)
    found = torch.as_tensor(values, dtype=torch.float64)
    if found.shape != (K,):
        raise ValueError(f"{name} must have one entry a set, {K}, got shape {tuple(found.shape)}")
    return found.to(gramian.device, non_blocking=True)


def diagonal(gramian: Tensor) -> Tensor:
    """`|g_k|^2`, (..., K), with no negative number."""
    return gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0)


def inverse(x: Tensor) -> Tensor:
    """`1 / x`, and 0 where `x` is 0."""
    return torch.where(x == 0, 0.0, 1 / x)


def trace_scaled(gramian: Tensor) -> Tensor:
    """The Gramian divided by its trace; zero stays zero."""
    return gramian * inverse(diagonal(gramian).sum(-1))[..., None, None]


def cosines(gramian: Tensor) -> Tensor:
    """`<g_i, g_j> / (|g_i| |g_j|)`, (..., K, K); 0 where a gradient is zero."""
    scale = inverse(diagonal(gramian).sqrt())
    return gramian * scale[..., :, None] * scale[..., None, :]

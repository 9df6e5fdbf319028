"""What a module has to say for itself: which tensors of a call to keep, and what gradients they stand for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from unlearn_kernels.per_sample.modules.use import Use


class Kept(NamedTuple):
    """What a layer wants of one call: tensors, which autograd keeps for it, and anything else."""

    tensors: tuple[Tensor, ...]
    note: Any = None


class Layer(ABC):
    """A module of the model with parameters to follow.

    Args:
        path: its name in the model.
        module: the module.
        wanted: which of its parameters to follow, names in the module.
    """

    kind: ClassVar[str]
    # Whether a flattened batch (B T, ...) can be taken apart again, and a missing batch dimension be put in.
    flexible = True

    def __init__(self, path: str, module: nn.Module, wanted: frozenset[str]) -> None:
        self.path, self.module, self.wanted = path, module, wanted

    def keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: tuple[Tensor, ...]) -> Kept:
        """What the gradients need of a call: by default its one input."""
        values = [*args, *kwargs.values()]
        if len(values) != 1 or not isinstance(values[0], Tensor):
            raise ValueError(f"{self.path}: one tensor expected as the input, got {len(values)} arguments")
        return Kept((values[0],))

    def check(self, kept: tuple[Tensor, ...], output: Tensor) -> None:  # noqa: B027 (most have nothing to check)
        """Raises a `ValueError` for shapes, samples first, that the layer does not understand."""

    def localise(self) -> str | None:
        """Takes its tensors to be a process's part of them, or says why that cannot be."""
        return "only linear layers can be spread over processes"

    @abstractmethod
    def uses(self, kept: Kept, grads: tuple[Tensor | None, ...]) -> dict[str, Use]:
        """The per-sample gradients of each wanted parameter, from what was kept and the outputs' gradients."""


def only(grads: tuple[Tensor | None, ...]) -> Tensor:
    """The gradient of a layer with one output."""
    (grad,) = grads
    assert grad is not None
    return grad

"""Finds parameters that are used outside of the modules that hold them, where no hook would see it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_HARMLESS = {"detach", "detach_", "register_hook", "requires_grad_", "is_contiguous"}


class Watch(TorchFunctionMode):
    """Raises when a followed parameter is an argument of a torch function while no layer that has it runs.

    A module that multiplies by another's weight (a tied head without a module, a fused perceptron,
    `nn.MultiheadAttention`) would otherwise lose that part of the gradient in silence.

    Args:
        names: the followed parameters' names by `id`.
        owners: the parameters of each layer, by the layer's path.
    """

    def __init__(self, names: Mapping[int, str], owners: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.names = names
        self.owners = {path: frozenset(ids) for path, ids in owners.items()}
        self.running: list[str] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if isinstance(result, Tensor | tuple | list) and name not in _HARMLESS:
            self._check(name, args, kwargs, result)
        return result

    def _check(self, function: str, args: Any, kwargs: Any, result: Any) -> None:
        used = {id(x) for x in pytree.tree_leaves((args, kwargs)) if id(x) in self.names}
        outside = used - (self.owners[self.running[-1]] if self.running else frozenset())
        if not outside or not _has_tensor(result, used):
            return
        where = f" while {self.running[-1]} runs" if self.running else ""
        raise ValueError(
            f"{self.names[outside.pop()]} is used directly by {function}{where}, outside of the module that holds "
            "it: its gradient there cannot be followed. Call the module instead, or freeze the parameter."
        )


def _has_tensor(result: Any, used: set[int]) -> bool:
    leaves = pytree.tree_leaves(result)
    return any(isinstance(x, Tensor) and x.is_floating_point() and id(x) not in used for x in leaves)

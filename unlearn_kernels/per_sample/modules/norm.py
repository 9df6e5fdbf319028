"""LayerNorm, RMSNorm, GroupNorm and InstanceNorm: the gradients of scale and bias are small, and kept."""

from typing import Any

from torch import Tensor, nn

from unlearn_kernels.per_sample import norm
from unlearn_kernels.per_sample.modules.layer import Kept, Layer, only
from unlearn_kernels.per_sample.modules.use import Dense, Use


class NormLayer(Layer):
    """A normalisation with a scale `w` or `1 + w`, and perhaps a bias.

    Args:
        path: its name in the model.
        module: the module.
        wanted: which of its parameters to follow.
        shape: how it normalises, as `per_sample.norm` takes it.
    """

    kind = "norm"

    def __init__(self, path: str, module: nn.Module, wanted: frozenset[str], shape: dict[str, Any]) -> None:
        super().__init__(path, module, wanted)
        self.shape = shape
        self.flexible = shape["kind"] != "group"

    def uses(self, kept: Kept, grads: tuple[Tensor | None, ...]) -> dict[str, Use]:
        found = norm.grads(kept.tensors[0], only(grads), bias="bias" in self.wanted, **self.shape)
        values = {"weight": found.weight, "bias": found.bias}
        return {name: Dense(x) for name, x in values.items() if x is not None and name in self.wanted}

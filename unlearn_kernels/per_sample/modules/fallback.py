"""The exact way for modules without a kernel: the module once more, sample by sample, under `torch.func`."""

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from unlearn_kernels.per_sample.modules.layer import Kept, Layer
from unlearn_kernels.per_sample.modules.use import Dense, Use, widened

_TENSOR: Final = object()


class _Call(NamedTuple):
    """One call of a module, without its tensors."""

    frame: pytree.TreeSpec
    leaves: list[Any]
    samples: int
    fingerprint: Tensor


def float_tensors(tree: Any) -> tuple[Tensor, ...]:
    """What of a module's result has a gradient."""
    leaves = pytree.tree_leaves(tree)
    return tuple(x for x in leaves if isinstance(x, Tensor) and x.is_floating_point())


class FallbackLayer(Layer):
    """Any module: gradients (B, *shape) of its own parameters, from a second run of it for each sample.

    Submodules are followed by themselves. Tensors among the arguments whose first dimension is B are taken
    apart by sample, the others are given to every sample; the second run's outputs are compared with the
    first's, so that an argument taken wrongly raises.
    """

    kind = "vmap"
    flexible = False

    def keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: tuple[Tensor, ...]) -> Kept:
        leaves, frame = pytree.tree_flatten((args, dict(kwargs)))
        others = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
        return Kept(tensors, _Call(frame, others, outputs[0].shape[0], _fingerprint(outputs)))

    def _function(self, call: _Call, tensors: tuple[Tensor, ...]) -> Callable[..., tuple[Tensor, ...]]:
        def run(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
            given = iter(tensors)
            leaves = [next(given) if leaf is _TENSOR else leaf for leaf in call.leaves]
            args, kwargs = pytree.tree_unflatten(leaves, call.frame)
            return float_tensors(functional_call(self.module, weights, args, kwargs))

        return run

    def uses(self, kept: Kept, grads: tuple[Tensor | None, ...]) -> dict[str, Use]:
        call = kept.note
        weights = {name: self.module.get_parameter(name).detach() for name in sorted(self.wanted)}
        apart = [x.dim() > 0 and x.shape[0] == call.samples for x in kept.tensors]

        def one(tensors: tuple[Tensor, ...], given: tuple[Tensor, ...]) -> tuple[Any, Any]:
            alone = tuple(x[None] if split else x for x, split in zip(tensors, apart, strict=True))
            outputs, back = vjp(self._function(call, alone), weights)[:2]
            rest = iter(given)
            cotangents = tuple(
                torch.zeros_like(x) if g is None else next(rest)[None]
                for x, g in zip(outputs, grads, strict=True)
            )
            return back(cotangents)[0], outputs

        present = tuple(g for g in grads if g is not None)
        dims = tuple(0 if split else None for split in apart)
        with torch.enable_grad():
            found, outputs = vmap(one, in_dims=(dims, 0))(kept.tensors, present)
        again = _fingerprint(tuple(x.flatten(0, 1) for x in outputs))
        if not torch.allclose(again, call.fingerprint, rtol=1e-3, equal_nan=True):
            raise RuntimeError(
                f"{self.path}: run again sample by sample, {type(self.module).__name__} gave other outputs; "
                "one of its arguments has the batch size as its first dimension but is not one row a sample"
            )
        return {name: Dense(widened(value.detach())) for name, value in found.items()}


def _fingerprint(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([widened(x.detach()).flatten(1).square().sum(1) for x in outputs]).double()

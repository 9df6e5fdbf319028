"""TRAK with projections that need no matrix: a projector for `TRAKer(projector=...)`, and a `fast_jl` for every device.

.. code-block:: python

    from unlearn_adapters.trak import Projector

    projector = Projector(grad_dim=count_parameters(model), proj_dim=2048, seed=0, proj_type="rademacher", device="cpu")
    traker = TRAKer(model=model, task="image_classification", train_set_size=n, projector=projector)
"""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trak.projectors import AbstractProjector, ProjectionType

from unlearn_adapters import fast_jl
from unlearn_kernels.influence import Projection
from unlearn_kernels.influence.projection import Name

_MODELS = 1 << 31
_before: dict[str, Any] = {}


class Projector(AbstractProjector):
    """A projector of TRAK's, `BasicProjector` and `CudaProjector` in one, without their matrix or CUDA extension.

    `project` returns `g P^T` without the scale `1 / sqrt(k)`, as theirs. P is the same on every device and for every
    batch, and another for every model: the seed and the model's number stay apart, where TRAK adds a multiple of the
    one to the other. The numbers are not those that TRAK's own projectors draw.

    Args:
        grad_dim: parameters.
        proj_dim: outputs; any number.
        seed: less than 2^31.
        proj_type: `rademacher` or `normal`, or another kind of `influence.Projection`: `sjlt` and `srht` cost least.
        device: where projections are returned.
        block_size: ignored.
        dtype: of what is returned; None for the gradients'.
        others: of TRAK's projectors (`max_batch_size`, `model_id`), ignored.

    Raises:
        ValueError: for an unknown `proj_type` or a seed out of range.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        seed: int,
        proj_type: str | ProjectionType,
        device: str | torch.device,
        block_size: int = 100,
        dtype: torch.dtype | None = None,
        *_: Any,
        **others: Any,
    ) -> None:
        super().__init__(grad_dim, proj_dim, seed, proj_type, device)
        name = proj_type.value if isinstance(proj_type, ProjectionType) else proj_type
        self.kind: Name = {"normal": "gaussian"}.get(name, name)  # type: ignore[assignment]
        self.dtype = dtype
        if not 0 <= seed < _MODELS:
            raise ValueError(f"seed must be between 0 and {_MODELS - 1}, got {seed}")
        self.projection(0)

    def projection(self, model_id: int) -> Projection:
        """The projection of a model, with the scale that `project` leaves out.

        Raises:
            ValueError: if the number is negative or 2^31 or more.
        """
        if not 0 <= model_id < _MODELS:
            raise ValueError(f"model_id must be between 0 and {_MODELS - 1}, got {model_id}")
        return Projection(self.grad_dim, self.proj_dim, self.kind, self.seed + _MODELS * model_id)

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int) -> Tensor:
        """Project gradients (B, grad_dim), or (B, *shape) by parameter, which are never put together.

        Returns:
            (B, proj_dim), in `dtype` or the gradients'.

        Raises:
            ValueError: if the gradients are not `grad_dim` wide.
        """
        projection = self.projection(model_id)
        if isinstance(grads, Tensor):
            dtype, rows = grads.dtype, projection.project(grads.detach())
        else:
            running = projection.running()
            for g in grads.values():
                running.add(g.detach().flatten(1) if g.dim() > 1 else g.detach()[:, None])
            rows, dtype = running.result(), g.dtype
        return (rows * self.proj_dim**0.5).to(self.device, self.dtype or dtype)


def install() -> None:
    """Makes `import fast_jl` give `unlearn_adapters.fast_jl`, so that `CudaProjector` needs no compiled extension."""
    if "fast_jl" not in _before:
        _before["fast_jl"] = sys.modules.get("fast_jl")
    sys.modules["fast_jl"] = fast_jl


def uninstall() -> None:
    """Undoes `install`."""
    before = _before.pop("fast_jl", None)
    if before is not None:
        sys.modules["fast_jl"] = before
    elif sys.modules.get("fast_jl") is fast_jl:
        del sys.modules["fast_jl"]

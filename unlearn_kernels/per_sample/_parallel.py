"""How per-sample quantities and weighted sums of a model that is spread over processes become whole."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Sums = Mapping[str, Callable[[], Tensor]]


def is_dtensor(x: Tensor) -> bool:
    """Whether `x` is a `DTensor`, without importing what builds of torch may lack."""
    return type(x).__name__ == "DTensor" or hasattr(x, "_local_tensor")


class Parallel:
    """One process: nothing to do. The base of the others.

    Args:
        model: the model as the caller runs it, in its wrapper.
        parameters: what is followed.
    """

    # Names of parameters of which the process has a part, and samples' gradients a part.
    parts: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self.model, self.parameters = model, parameters

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """While no parameter has a gradient of its own, nobody must wait for one."""
        yield

    def summed(self, table: Tensor, names: Sequence[str]) -> Tensor:
        """Rows, one a parameter, added up."""
        return table.sum(0)

    def completed(self, table: Tensor, names: Sequence[str]) -> Tensor:
        """Rows, one a parameter, each of the whole parameter."""
        return table

    def total(self, samples: int) -> int:
        """The samples of all processes."""
        return samples

    def accumulate(self, sums: Sums, release: Callable[[str], None]) -> None:
        """Adds to `.grad` the sum over all processes. `release` is called when a sum has been formed."""
        for name, parameter in self.parameters.items():
            if name in sums:
                self._add(parameter, self._formed(name, sums, release))

    def _formed(self, name: str, sums: Sums, release: Callable[[str], None]) -> Tensor:
        parameter = self.parameters[name]
        if name not in sums:
            return torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
        value = sums[name]().to(parameter.dtype)
        release(name)
        return value

    @staticmethod
    def _add(parameter: nn.Parameter, value: Tensor) -> None:
        if parameter.grad is None:
            parameter.grad = value
        else:
            parameter.grad += value


class Replicated(Parallel):
    """`DistributedDataParallel`: every process has its samples and the whole model."""

    def __init__(self, model: DistributedDataParallel, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, parameters)
        self.group = model.process_group

    @contextmanager
    def quiet(self) -> Iterator[None]:
        before = self.model.require_backward_grad_sync
        self.model.require_backward_grad_sync = False  # type: ignore[assignment]
        try:
            yield
        finally:
            self.model.require_backward_grad_sync = before

    def total(self, samples: int) -> int:
        count = torch.tensor(samples, device=next(iter(self.parameters.values())).device)
        dist.all_reduce(count, group=self.group)
        return int(count)

    def accumulate(self, sums: Sums, release: Callable[[str], None]) -> None:
        values = {name: self._formed(name, sums, release) for name in self.parameters}
        for dtype in sorted({v.dtype for v in values.values()}, key=str):
            names = [name for name in values if values[name].dtype == dtype]
            whole = torch.cat([values.pop(name).flatten() for name in names])
            dist.all_reduce(whole, group=self.group)
            sizes = [self.parameters[name].numel() for name in names]
            for name, value in zip(names, whole.split(sizes), strict=True):
                self._add(self.parameters[name], value.view_as(self.parameters[name]).clone())


class Sharded(Parallel):
    """FSDP2 (`fully_shard`): every process has its samples and a part of each parameter."""

    def _summed_over_mesh(self, x: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Partial

        mesh = next(p for p in self.parameters.values() if is_dtensor(p)).device_mesh  # type: ignore[attr-defined]
        return DTensor.from_local(x, mesh, [Partial()] * mesh.ndim).full_tensor()

    def total(self, samples: int) -> int:
        device = next(iter(self.parameters.values())).device
        return int(self._summed_over_mesh(torch.tensor(float(samples), device=device)))

    def accumulate(self, sums: Sums, release: Callable[[str], None]) -> None:
        from torch.distributed.tensor import DTensor, Partial

        for name, parameter in self.parameters.items():
            value = self._formed(name, sums, release)
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                spread = DTensor.from_local(value, mesh, [Partial()] * mesh.ndim, run_check=False)
                value = spread.redistribute(placements=parameter.placements)
            else:
                value = self._summed_over_mesh(value)
            self._add(parameter, value)


class TensorParallel(Parallel):
    """Every process has all samples and a part of some weights: norms are partial sums, one all-reduce.

    Args:
        model: the model.
        parameters: what is followed.
        group: the processes that share a layer.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup
    ) -> None:
        super().__init__(model, parameters)
        self.group = group
        self.parts = frozenset(name for name, p in parameters.items() if _is_part(p))

    def summed(self, table: Tensor, names: Sequence[str]) -> Tensor:
        split = torch.tensor([name in self.parts for name in names], device=table.device)
        partial = table[split].sum(0)
        dist.all_reduce(partial, group=self.group)
        return partial + table[~split].sum(0)

    def completed(self, table: Tensor, names: Sequence[str]) -> Tensor:
        split = torch.tensor([name in self.parts for name in names], device=table.device)
        partial = table[split]
        dist.all_reduce(partial, group=self.group)
        table[split] = partial
        return table

    def _formed(self, name: str, sums: Sums, release: Callable[[str], None]) -> Tensor:
        parameter = self.parameters[name]
        value = super()._formed(name, sums, release)
        if not is_dtensor(parameter):
            return value
        from torch.distributed.tensor import DTensor

        assert isinstance(parameter, DTensor)
        return DTensor.from_local(
            value,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def _is_part(parameter: nn.Parameter) -> bool:
    """Whether a process holds a part of it: a sharded `DTensor`, or Megatron's mark on a plain tensor."""
    if is_dtensor(parameter):
        return any(placement.is_shard() for placement in parameter.placements)  # type: ignore[attr-defined]
    return bool(getattr(parameter, "tensor_model_parallel", False))


def parallel_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], tensor_parallel: dist.ProcessGroup | None
) -> Parallel:
    """How `model` is spread."""
    if tensor_parallel is not None:
        return TensorParallel(model, parameters, tensor_parallel)
    if isinstance(model, DistributedDataParallel):
        return Replicated(model, parameters)
    if any(is_dtensor(p) for p in parameters.values()):
        return Sharded(model, parameters)
    return Parallel(model, parameters)

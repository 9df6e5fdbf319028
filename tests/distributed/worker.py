"""What each process of the distributed tests runs: every check compares with a single process's numbers."""

import socket
from collections.abc import Callable
from contextlib import closing

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from tests.distributed import influence, surgery
from tests.per_sample.models import Text, clipped, flattened, half_square, looped, sqnorms, text
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.testing import relative_error

EXACT = 1e-9


def make() -> nn.Module:
    torch.manual_seed(0)
    return Text(tied=False).double()


def mean_loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x).square().flatten(1).sum(1) / 2).mean()


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def check_data_parallel(wrap: Callable[[nn.Module], nn.Module]) -> None:
    """Each process has its own samples; norms are theirs, the clipped gradient is everybody's."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x = text(3 * world)
    exact = looped(make(), list(x.split(1)), half_square)
    norms = sqnorms(exact)
    max_norm = float(norms.sqrt().median())
    expected = clipped(exact, max_norm, mean=True)
    model = wrap(make())
    mine = slice(3 * rank, 3 * rank + 3)
    with PerSampleGradients(model) as gradients:
        for step in (1, 2):
            mean_loss(model, x[mine]).backward()
            assert relative_error(gradients.sqnorms(), norms[mine]) < EXACT
            gradients.clip_(max_norm)
            for name, p in gradients.parameters.items():
                assert relative_error(whole(p.grad), step * expected[name]) < EXACT, name
    # The wrapper works on as before: its own gradient is the mean over the processes.
    model.zero_grad()
    mean_loss(model, x[mine]).backward()
    for name, p in gradients.parameters.items():
        assert relative_error(whole(p.grad), exact[name].mean(0)) < EXACT, name


def shard(model: nn.Module) -> nn.Module:
    fully_shard(model.inner)
    fully_shard(model.head)
    return fully_shard(model)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(self.norm(x))))


def check_tensor_parallel() -> None:
    """Every process has all samples and some of a layer's features."""
    torch.manual_seed(0)
    single = Perceptron().double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    exact = looped(single, list(x.split(1)), half_square)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(single, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    reduced = []
    with PerSampleGradients(model, loss_reduction="sum", tensor_parallel=mesh.get_group()) as gradients:
        half_square(model, x).backward()
        call, dist.all_reduce = dist.all_reduce, lambda *a, **k: reduced.append(a[0].shape) or call(*a, **k)
        found = gradients.sqnorms()
        dist.all_reduce = call
        assert reduced == [(5,)]
        assert relative_error(found, sqnorms(exact)) < EXACT
        by = gradients.sqnorms("parameter")
        for name, g in exact.items():
            assert relative_error(by[name], g.flatten(1).square().sum(1)) < EXACT, name
        assert relative_error(gradients.dots(gradients), flattened(exact) @ flattened(exact).T) < EXACT
        gradients.clip_(1.0)
        for name, value in clipped(exact, 1.0, mean=False).items():
            assert relative_error(whole(gradients.parameters[name].grad), value) < EXACT, name


def run(rank: int, world: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        check_data_parallel(DistributedDataParallel)
        check_data_parallel(shard)
        check_tensor_parallel()
        surgery.check()
        influence.check()
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])

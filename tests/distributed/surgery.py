"""Gradient surgery in each process of the distributed tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from unlearn_kernels import surgery
from unlearn_kernels.surgery import GradientSurgery
from unlearn_kernels.testing import randn, relative_error

EXACT = 1e-9
RULES = ("agem", "upgrad")


class Perceptron(nn.Module):
    """Odd sizes, so that shards differ; `extra` is reached by the retain loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.extra = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        h = self.down(torch.tanh(self.up(self.norm(x))))
        return self.extra(h) if extra else h


def make() -> Perceptron:
    torch.manual_seed(0)
    return Perceptron().double()


def forget_loss(model: nn.Module, x: Tensor) -> Tensor:
    return -(model(x) - 0.3).square().mean()


def retain_loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean() + model(x, extra=True).square().mean()


def data(step: int, samples: int) -> tuple[Tensor, Tensor]:
    f, r = (randn(samples, 8, seed=10 * step + k, dtype=torch.float64) for k in range(2))
    return f, r


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def reductions() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what `all_reduce` is called with."""
    seen: list[tuple[int, ...]] = []
    call = dist.all_reduce
    dist.all_reduce = lambda x, *a, **k: seen.append(tuple(x.shape)) or call(x, *a, **k)
    try:
        yield seen
    finally:
        dist.all_reduce = call


def train(model: nn.Module, rule: str, mine: slice, samples: int, **options: object) -> list[Tensor]:
    """Two steps on the process's samples; the weights of both."""
    surg = GradientSurgery(model, rule, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for step in range(2):
        f, r = data(step, samples)
        with surg.objective("forget"):
            forget_loss(model, f[mine]).backward()
        with surg.objective("retain"):
            retain_loss(model, r[mine]).backward()
        found.append(surg.step(optimizer).weights)
    return found


def check_steps(
    wrap: Callable[[nn.Module], nn.Module],
    reduced: list[tuple[int, ...]],
    *,
    split: bool,
    rules: tuple[str, ...] = RULES,
    **options: object,
) -> None:
    """Steps of a wrapped model are those of a single process that has all samples."""
    rank, world = dist.get_rank(), dist.get_world_size()
    samples = 3 * world
    mine = slice(3 * rank, 3 * rank + 3) if split else slice(None)
    for rule in rules:
        single = make()
        expected = train(single, rule, slice(None), samples, **options)
        model = wrap(make())
        with reductions() as seen:
            found = train(model, rule, mine, samples, **options)
        assert seen == reduced, (rule, seen)
        for ours, exact in zip(found, expected, strict=True):
            assert relative_error(ours, exact) < EXACT, rule
            everybodys = [torch.empty_like(ours) for _ in range(world)]
            dist.all_gather(everybodys, ours)
            assert all(torch.equal(ours, other) for other in everybodys), rule
        for (name, p), q in zip(single.named_parameters(), model.parameters(), strict=True):
            assert relative_error(whole(q), p) < EXACT, (rule, name)


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    fully_shard(model.up, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def partly_sharded(model: nn.Module) -> nn.Module:
    """Layers that FSDP shards, and others that every process has; their gradients are averaged by hand."""
    fully_shard(model.up)
    fully_shard(model.extra)
    for layer in (model.norm, model.down):
        for p in layer.parameters():
            p.register_hook(averaged)
    return model


def averaged(gradient: Tensor) -> Tensor:
    parts = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, gradient.contiguous())
    return torch.stack(parts).mean(0)


PLAN = {"up": ColwiseParallel(), "down": RowwiseParallel()}


def parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, PLAN)


def check_gramian() -> None:
    """Any mixture of placements, a gradient that is due to be summed among them, counts each number once."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    shapes = ((7, 5), (9,), (4, 6), (3, 2), (2,), ())
    placements = (Shard(0), Shard(0), Shard(1), Replicate(), None, None)
    values = [
        [randn(*s, seed=10 * k + i, dtype=torch.float64) for i, s in enumerate(shapes)] for k in range(3)
    ]
    ps = [nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    for i, place in enumerate(placements):
        if place is not None:
            ps[i] = nn.Parameter(distribute_tensor(ps[i].data, mesh, [place]))
    groups = [{"params": ps[:2]}, {"params": ps[2:]}]
    for scope, numbers in (("global", (6,)), ("tensor", (6, 6)), ("group", (2, 6))):
        surg = GradientSurgery(
            groups, "mgda", objectives=("a", "b", "c"), scope=scope, group=dist.group.WORLD
        )
        for name, tensors in zip(surg.objectives, values, strict=True):
            with surg.objective(name):
                for p, x, place in zip(ps, tensors, placements, strict=True):
                    p.grad = x.clone() if place is None else distribute_tensor(x.clone(), mesh, [place])
                if name == "b":
                    due = DTensor.from_local(values[1][3] / world, mesh, [Partial()], run_check=False)
                    ps[3].grad = due
        by = {"scope": scope, "groups": [0, 0, 1, 1, 1, 1] if scope == "group" else None}
        exact = surgery.gramian(values, **by)
        with reductions() as seen:
            found = surg.apply()
        assert seen == [numbers]
        assert relative_error(found.gramian, exact) < 1e-13
        sums = surgery.combine(values, surgery.weights(exact, "mgda"), **by)
        for p, x in zip(ps, sums, strict=True):
            assert relative_error(whole(p.grad), x) < 1e-12
        surg.zero_grad()


def check_marked() -> None:
    """Megatron's parts of tensors are plain tensors with a mark."""
    rank, world = dist.get_rank(), dist.get_world_size()
    full = [
        [randn(2 * world, 3, seed=k, dtype=torch.float64), randn(5, seed=k + 9, dtype=torch.float64)]
        for k in range(2)
    ]
    ps = [
        nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)),
        nn.Parameter(torch.zeros(5, dtype=torch.float64)),
    ]
    ps[0].tensor_model_parallel = True
    surg = GradientSurgery(ps, "agem", group=dist.group.WORLD)
    for name, (part, replica) in zip(surg.objectives, full, strict=True):
        with surg.objective(name):
            ps[0].grad, ps[1].grad = part[2 * rank : 2 * rank + 2].clone(), replica.clone()
    assert relative_error(surg.apply().gramian, surgery.gramian(full)) < 1e-13


def check() -> None:
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    check_gramian()
    check_marked()
    for views in (False, True):
        # The extra layer has no forget gradient.
        check_steps(
            lambda m, v=views: DistributedDataParallel(
                m, gradient_as_bucket_view=v, find_unused_parameters=True
            ),
            [],
            split=True,
            rules=("pcgrad",),
        )
    check_steps(shard, [(3,), (3,)], split=True)
    # At the second step the average is a third source.
    check_steps(shard, [(3,), (6,)], split=True, rules=("gru",), ema={"retain": 0.5}, max_norm=0.1)
    check_steps(partly_sharded, [(3,), (3,)], split=True, rules=("pcgrad",))
    check_steps(lambda m: parallel(m, mesh), [(3,), (3,)], split=False, rules=("upgrad",))
    check_steps(shard, [(7, 3), (7, 3)], split=True, rules=("pcgrad",), scope="tensor")
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        both = (lambda m: shard(parallel(m, square["model"]), square["data"]), [(3,), (3,)])
        check_steps(*both, split=False, rules=("pcgrad",))

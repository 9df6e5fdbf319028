from importlib.util import find_spec

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.worker import free_port, run

pytestmark = pytest.mark.skipif(
    not dist.is_available(), reason="this build of torch has no torch.distributed"
)


@pytest.mark.parametrize("world", [2, 4])
def test_numbers_are_those_of_one_process(world):
    mp.spawn(run, (world, free_port()), nprocs=world)


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("world", [1, 2])
def test_lazy_logits_under_zero3(world):
    from tests.distributed import zero3

    mp.spawn(zero3.run, (world, free_port()), nprocs=world)

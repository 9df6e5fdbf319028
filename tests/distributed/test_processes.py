import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.distributed.worker import free_port, run


@pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")
@pytest.mark.parametrize("world", [2, 4])
def test_numbers_are_those_of_one_process(world):
    mp.spawn(run, (world, free_port()), nprocs=world)

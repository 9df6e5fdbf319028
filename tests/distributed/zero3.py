"""Losses on lazy logits under DeepSpeed's ZeRO-3 itself."""

import copy
import itertools
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.token_loss.peers import batch
from tests.token_loss.test_lazy_logits import make
from unlearn_kernels.token_loss import hidden_rows, lazy_logits, linear_nll

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}


def sequence_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    return functional.cross_entropy(logits.mT, inputs["labels"][:, 1:], reduction="none").sum(1).mean()


def own_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).loss


def rows_loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    rows = hidden_rows(model, inputs)
    return linear_nll(*rows[:3], **rows.options, reduction="mean")


def check(loss: Any, tied: bool, steps: int, rank: int, world: int) -> None:
    """Two rounds of `steps` backwards, and every gradient beside one process's."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    model = make("Qwen2" if tied else "Llama")
    plain = copy.deepcopy(model)
    data = [batch(seed) for seed in range(world)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = CONFIG | {"gradient_accumulation_steps": steps}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    sum(loss(plain, x) for x in data).div(world).backward()
    head = model.lm_head.weight
    with lazy_logits(engine.module, strict=True):
        for turn in range(2 * steps):
            value = loss(engine, data[rank])
            engine.backward(value) if turn < steps else value.backward()
            if (turn + 1) % steps == 0:
                assert not head.numel()
                assert head.ds_status.name == "NOT_AVAILABLE"
                for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
                    torch.testing.assert_close(safe_get_full_grad(ours), theirs.grad, rtol=1e-4, atol=1e-6)
            engine.step()


def run(rank: int, world: int, port: int) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed("gloo")
    for loss, tied, steps in itertools.product((sequence_loss, own_loss, rows_loss), (False, True), (1, 2)):
        check(loss, tied, steps, rank, world)
    torch.distributed.destroy_process_group()

"""Whole passes of small Llamas beside the plain ones: projected gradients of samples, and RMU with an early exit.

    python -m benchmarks.passes [collector | early_exit] [--small] [--rounds N]

Medians of N rounds in which all ways take turns. collector: 1.8M parameters, 32 sequences of 64 tokens, one thread.
early_exit: 32 layers of d 256, the hook at layer 7, 2 sequences of 64 tokens, V 32,000, two threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from unlearn_kernels.influence import Projection, layer_projections
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.token_loss import control_vector, early_exit, rmu

Ways = dict[str, Callable[[], object]]


def llama(width: int, layers: int, vocabulary: int) -> nn.Module:
    """A model of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": width, "intermediate_size": width * 43 // 16, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, **shape)).eval()


def collector_ways(small: bool) -> Ways:
    """A forward and backward alone, and with each projection of every sample's gradient."""
    model = llama(64 if small else 256, 2, 512)
    ids = torch.randint(512, (4 if small else 32, 64))
    size = sum(p.numel() for p in model.parameters())
    projections: dict[str, Any] = {
        "Projection(P, 512)": Projection(size, 512),
        'Projection(P, 512, "sjlt")': Projection(size, 512, "sjlt"),
        "layer_projections(model, 256)": layer_projections(model, 256),
        'layer_projections(model, 256, "two_sided")': layer_projections(model, 256, "two_sided"),
    }

    def plain() -> None:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()

    def projected(projection: Any) -> Callable[[], object]:
        def run() -> object:
            with PerSampleGradients(model, loss_reduction="sum") as gradients:
                model(ids, labels=ids).loss.backward()
                return gradients.project(projection)

        return run

    return {"forward and backward alone": plain} | {name: projected(p) for name, p in projections.items()}


def early_exit_ways(small: bool) -> Ways:
    """RMU's forward and backward, whole and ended at its layer; three layers trained, and all of them."""
    model = llama(64 if small else 256, 10 if small else 32, 512 if small else 32_000)
    ids = torch.randint(512, (2, 64))
    control = control_vector(64 if small else 256)
    trained = [f"layers.{i}.mlp.down_proj" for i in (5, 6, 7)]

    def step(everything: bool) -> None:
        for name, p in model.named_parameters():
            p.requires_grad_(everything or any(x in name for x in trained))
        kept: list[Tensor] = []

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        with model.get_submodule("model.layers.7").register_forward_hook(keep):
            model(input_ids=ids, labels=ids)
        rmu(kept[0], control).backward()
        model.zero_grad()

    def ended(everything: bool) -> None:
        with early_exit(model, "model.layers.7"):
            step(everything)

    return {
        f"{name}, {what} trained": lambda run=run, everything=everything: run(everything)
        for what, everything in (("three layers", False), ("all", True))
        for name, run in (("whole", step), ("early exit", ended))
    }


GROUPS: Final[dict[str, tuple[Callable[[bool], Ways], int]]] = {
    "collector": (collector_ways, 1),
    "early_exit": (early_exit_ways, 2),
}


def medians(ways: Ways, rounds: int) -> dict[str, float]:
    """Seconds of each way, after one call that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begun = time.perf_counter()
            way()
            if turn > 0:
                taken[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times) for name, times in taken.items()}


def main(arguments: list[str] | None = None) -> None:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", nargs="*", choices=[*GROUPS, []], help="both if there is none")
    parser.add_argument("--small", action="store_true", help="models of a second, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    for group in options.group or GROUPS:
        ways, threads = GROUPS[group]
        torch.set_num_threads(threads)
        for name, seconds in medians(ways(options.small), options.rounds).items():
            print(f"{group:<12}{name:<46}{seconds * 1e3:>9.1f} ms", flush=True)


if __name__ == "__main__":
    main()

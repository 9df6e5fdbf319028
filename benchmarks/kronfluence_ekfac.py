"""EK-FAC by Kronfluence with `unlearn_adapters.kronfluence` and without: seconds of each stage, difference of scores.

    python -m benchmarks.kronfluence_ekfac

A Llama of 2 layers, d 256, 14 linear layers of 2.1M parameters, on 64 sequences of 64 tokens, one thread. `--json FILE`
writes the numbers; `--rounds N` takes the fastest of N runs of each, one after the other in turn. Needs Kronfluence.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import describe
from unlearn_kernels.testing import relative_error

TOKENS, SEQUENCES, QUERIES, VOCABULARY = 64, 64, 8, 512


# All that Kronfluence computes in a precision of its own.
DOUBLE_FACTORS = (
    "activation_covariance_dtype",
    "gradient_covariance_dtype",
    "per_sample_gradient_dtype",
    "lambda_dtype",
)
DOUBLE_SCORES = ("per_sample_gradient_dtype", "precondition_dtype", "score_dtype")


def new_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def new_analyzer(folder: str, dtype: torch.dtype) -> Any:
    from kronfluence import Analyzer, Task, prepare_model

    model = new_model(dtype)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = model(batch[0]).logits[:, :-1].flatten(0, 1)
            return nn.functional.cross_entropy(logits, batch[0][:, 1:].flatten(), reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    task = Language()
    return Analyzer("e", prepare_model(model, task), task, cpu=True, output_dir=folder, disable_tqdm=True)


def timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def run(batch_size: int = 16, dtype: torch.dtype = torch.float32) -> tuple[dict[str, float], Tensor]:
    """Seconds of each stage, and the scores, with factors from batches of a size, all of it in one precision."""
    from kronfluence import FactorArguments, ScoreArguments

    torch.manual_seed(1)
    from torch.utils.data import TensorDataset

    train, queries = (TensorDataset(torch.randint(VOCABULARY, (n, TOKENS))) for n in (SEQUENCES, QUERIES))
    args = FactorArguments(
        strategy="ekfac", use_empirical_fisher=True, **dict.fromkeys(DOUBLE_FACTORS, dtype)
    )
    score_args = ScoreArguments(**dict.fromkeys(DOUBLE_SCORES, dtype))
    batch = {"per_device_batch_size": batch_size, "factor_args": args}
    with tempfile.TemporaryDirectory() as folder:
        analyzer = new_analyzer(folder, dtype)
        model = new_model(dtype)

        def plain() -> None:
            for (ids,) in torch.utils.data.DataLoader(train, 16):
                loss = nn.functional.cross_entropy(
                    model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                )
                loss.backward()

        seconds = {
            "forward+backward": timed(plain),
            "covariance": timed(lambda: analyzer.fit_covariance_matrices("f", train, **batch)),
            "eigendecomposition": timed(lambda: analyzer.perform_eigendecomposition("f", args)),
            "lambda": timed(lambda: analyzer.fit_lambda_matrices("f", train, **batch)),
        }
        seconds["pairwise scores"] = timed(
            lambda: analyzer.compute_pairwise_scores(
                "s", "f", queries, train, QUERIES, per_device_train_batch_size=16, score_args=score_args
            )
        )
        return seconds, analyzer.load_pairwise_scores("s")["all_modules"]


def measured(rounds: int) -> dict[str, Any]:
    from unlearn_adapters import kronfluence as adapter

    new_model()
    gc.freeze()  # Kronfluence collects garbage twice a stage: 0.2 s each over what imports have left
    best: dict[str, dict[str, float]] = {"kronfluence": {}, "unlearn_adapters": {}}
    scores: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name in best:
            if name == "unlearn_adapters":
                adapter.install()
            try:
                seconds, scores[name] = run()
            finally:
                adapter.uninstall()
            best[name] = {stage: min(s, best[name].get(stage, s)) for stage, s in seconds.items()}
    theirs, wide = scores["kronfluence"].double(), run(dtype=torch.float64)[1]
    return {
        "machine": describe("cpu"),
        "seconds": best,
        "difference of scores": relative_error(scores["unlearn_adapters"], theirs),
        # The basis of nearly equal eigenvalues turns with the last digits of a covariance.
        "difference of Kronfluence's own with batches of 32": relative_error(run(32)[1], theirs),
        "Kronfluence from its own in float64": relative_error(theirs, wide),
        "unlearn_adapters from Kronfluence in float64": relative_error(scores["unlearn_adapters"], wide),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = measured(options.rounds)
    theirs, ours = found["seconds"]["kronfluence"], found["seconds"]["unlearn_adapters"]
    for stage in theirs:
        print(f"{stage:<20}{theirs[stage]:>8.2f} s{ours[stage]:>8.2f} s{theirs[stage] / ours[stage]:>8.2f} x")
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name}: {value:.1e}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

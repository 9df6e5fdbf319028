"""`unlearn_adapters.kronfluence`: factors and scores of Kronfluence's own Analyzer with it and without it."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from unlearn_kernels.testing import randn, relative_error

pytest.importorskip("kronfluence")

from kronfluence import Analyzer, FactorArguments, ScoreArguments, Task, prepare_model
from kronfluence.module.tracker.factor import CovarianceTracker, LambdaTracker

from unlearn_adapters import kronfluence as ours

N, T, WIDTH, CLASSES = 21, 5, 6, 4


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Kronfluence collects garbage twice a stage: not over all that imports have left."""
    gc.freeze()
    yield
    gc.unfreeze()


class Reads(nn.Module):
    """A sequence to classes: a linear layer over tokens with a bias and one without, a convolution, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mix = nn.Linear(WIDTH, 8), nn.Linear(8, 8, bias=False)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(torch.tanh(self.up(x))))
        return self.head(self.conv(h[:, None]).mean(2).flatten(1))


class Classes(Task):
    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="sum")

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def fitted(path: Path, strategy: str, **options: Any) -> tuple[dict[str, dict[str, Tensor]], Tensor]:
    """All factors by kind and module, and pairwise scores."""
    torch.manual_seed(0)
    task = Classes()
    model = prepare_model(Reads(), task)
    data = TensorDataset(randn(N, T, WIDTH), torch.arange(N) % CLASSES)
    analyzer = Analyzer("test", model, task, cpu=True, output_dir=str(path), disable_tqdm=True)
    args = FactorArguments(strategy=strategy, use_empirical_fisher=True, **options)
    analyzer.fit_all_factors("f", data, per_device_batch_size=8, factor_args=args)
    analyzer.compute_pairwise_scores(
        "s",
        "f",
        data,
        data,
        per_device_query_batch_size=8,
        per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=None),
    )
    factors: dict[str, dict[str, Tensor]] = {}
    if strategy in ("ekfac", "kfac"):
        factors |= analyzer.load_covariance_matrices("f")
    if strategy in ("ekfac", "diagonal"):
        factors |= analyzer.load_lambda_matrices("f")
    return factors, analyzer.load_pairwise_scores("s")["all_modules"]


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("ekfac", {}),
        ("diagonal", {}),
        ("ekfac", {"has_shared_parameters": True}),
        ("ekfac", {"lambda_dtype": torch.float64, "per_sample_gradient_dtype": torch.float64}),
    ],
)
def test_factors_and_scores_are_kronfluences(tmp_path: Path, strategy: str, options: dict[str, Any]) -> None:
    expected, scores = fitted(tmp_path / "theirs", strategy, **options)
    ours.install()
    try:
        found, again = fitted(tmp_path / "ours", strategy, **options)
    finally:
        ours.uninstall()
    assert set(found) == set(expected)
    for kind, modules in expected.items():
        assert set(found[kind]) == set(modules)
        for name, factor in modules.items():
            # The counts too; Lambda's basis is known up to signs, which squares do not see.
            assert relative_error(found[kind][name], factor) < 1e-4, (kind, name)
    assert relative_error(again, scores) < 1e-4


def test_it_is_the_kernels_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("covariance", "rotated_squares"):
        call = getattr(ours, name)
        monkeypatch.setattr(
            ours, name, lambda *a, call=call, name=name, **k: seen.append(name) or call(*a, **k)
        )
    before = CovarianceTracker._update_activation_covariance_matrix, LambdaTracker.register_hooks
    ours.install()
    try:
        fitted(tmp_path, "ekfac")
    finally:
        ours.uninstall()
    batches, linear, layers = 3, 3, 4
    assert seen.count("rotated_squares") == batches * linear
    assert seen.count("covariance") == batches * layers * 2
    assert (CovarianceTracker._update_activation_covariance_matrix, LambdaTracker.register_hooks) == before

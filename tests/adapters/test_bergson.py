"""`unlearn_adapters.bergson` beside Bergson: projections of the same scale, and the scorer's best scores."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.testing import randn, relative_error

pytest.importorskip("bergson")

from bergson.collector import collector
from bergson.gradients import OuterProductGradients
from bergson.score.score_writer import InMemorySequenceScoreWriter
from bergson.score.scorer import Scorer

from unlearn_adapters import bergson as ours

B, S, P, D = 5, 4, 7, 9


def outer(bias: bool, per_example: bool, divisor: bool = False) -> OuterProductGradients:
    rows = (B, S) if per_example else (B,)
    a, g = randn(*rows, D, dtype=torch.float64), randn(*rows, P, dtype=torch.float64, seed=1)
    divide = randn(P, D, dtype=torch.float64, seed=2).abs() + 1 if divisor else None
    if not bias:
        return OuterProductGradients(g, a, divisor=divide)
    a[..., -1] = 0
    column = torch.zeros(D, dtype=torch.float64)
    column[-1] = 1
    return OuterProductGradients(g, a, g.sum(1) if per_example else g, column, divisor=divide)


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("divisor", [True, False])
@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_factors_are_projected_as_the_gradients_they_stand_for(
    per_example: bool, bias: bool, divisor: bool, kind: str
) -> None:
    P = outer(bias, per_example, divisor)
    whole = P.materialize().flatten(1)
    for y in (ours.project_global("layer", x, 33, kind) for x in (P, whole)):
        assert y.dtype == torch.float64
        assert y.shape == (B, 33)
        assert relative_error(y, ours.project_global("layer", whole, 33, kind)) < 1e-12
    assert relative_error(ours.project_global("other", whole, 33, kind), y) > 0.5
    if kind == "rademacher":
        rows = ours.project_global("layer", whole, 33, kind, "row_norm")
        assert relative_error(rows, y * (33 / whole.shape[1]) ** 0.5) < 1e-12


@pytest.mark.parametrize(
    ("kind", "scale"), [("rademacher", "jl"), ("normal", "jl"), ("rademacher", "row_norm")]
)
def test_scale_is_bergsons(kind: str, scale: str) -> None:
    """Inner products in the mean over names, of its projections and of these."""
    x = randn(3, 60, dtype=torch.float64)
    grams = []
    for project in (ours.project_global, ours._THEIRS):
        ys = [project(f"layer.{i}", x, 32, kind, scale) for i in range(200)]
        grams.append(torch.stack([y @ y.T for y in ys]).mean(0))
    assert relative_error(grams[0], grams[1]) < 0.1


def test_best_scores_of_a_scorer() -> None:
    queries = {"a": randn(4, 6), "b": randn(4, 3, seed=1)}
    rows = {"a": randn(30, 6, seed=2), "b": randn(30, 3, seed=3)}
    writer, every = ours.TopKWriter(4, 7), InMemorySequenceScoreWriter(30, 4)
    for into in (writer, every):
        scorer = Scorer(queries, ["a", "b"], into, torch.device("cpu"), torch.float32)
        for part in torch.randperm(30, generator=torch.Generator().manual_seed(0)).split(8):
            scorer(part.tolist(), {name: x[part] for name, x in rows.items()})
    writer.flush()
    largest, smallest = writer.found()
    for found, down in ((largest, True), (smallest, False)):
        values, numbers = every.scores.T.sort(dim=1, descending=down)
        assert torch.equal(found.values, values[:, :7])
        assert torch.equal(found.ids, numbers[:, :7])
        assert torch.equal(found.indices, found.ids)


def test_install_and_refusals() -> None:
    before = collector.project_global
    ours.install()
    assert collector.project_global is ours.project_global
    ours.uninstall()
    assert collector.project_global is before
    x: Tensor = randn(2, 8)
    for call, message in (
        (lambda: ours.project_global("n", x, 4, "uniform"), "projection_type must be"),
        (lambda: ours.project_global("n", x, 4, "normal", "row_norm"), "projection_scale must be 'jl'"),
        (lambda: ours.TopKWriter(0, 4), "num_queries must be at least 1, got 0"),
        (lambda: ours.TopKWriter(3, 4)([0], torch.ones(2, 3)), "scores must have 1 rows"),
        (lambda: ours.TopKWriter(3, 4).found(), "for every query"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(AttributeError, match="call found"):
        _ = ours.TopKWriter(3, 4).scores

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.models import Pictures, Text, clipped, flattened, half_square, looped, sqnorms, text
from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import PerSampleGradients, TwoSided
from unlearn_kernels.testing import randn, relative_error

EXACT = 1e-9


def pictures(B: int = 3, seed: int = 0) -> Tensor:
    return randn(B, 3, 9, 8, dtype=torch.float64, seed=seed)


CASES = {
    "text": (lambda: Text(), text),
    "tied": (lambda: Text(tied=True), text),
    "padded": (lambda: Text(padding_idx=0), text),
    "tied and padded": (lambda: Text(tied=True, padding_idx=3), text),
    "pictures": (Pictures, pictures),
}


@pytest.fixture(params=CASES)
def case(request):
    """A model in float64, a batch, and its gradients by a loop."""
    torch.manual_seed(0)
    make, inputs = CASES[request.param]
    model = make().double()
    x = inputs()
    return model, x, looped(model, list(x.split(1)), half_square)


def run(model: nn.Module, x: Tensor, reduction: str = "mean") -> None:
    per_sample = model(x).square().flatten(1).sum(1) / 2
    (per_sample.mean() if reduction == "mean" else per_sample.sum()).backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_norms_are_those_of_a_loop(case, reduction):
    model, x, exact = case
    with PerSampleGradients(model, loss_reduction=reduction) as gradients:
        run(model, x, reduction)
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
        assert relative_error(gradients.norms(), sqnorms(exact).sqrt()) < EXACT
        by = gradients.sqnorms("parameter")
        assert list(by) == list(exact)
        for name, g in exact.items():
            assert relative_error(by[name], g.flatten(1).square().sum(1)) < EXACT, name
        assert gradients.unused() == []
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_norms_only_keeps_nothing_else(case):
    model, x, exact = case
    with PerSampleGradients(model, keep="norms") as gradients:
        for _ in range(2):
            run(model, x)
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
        assert set(gradients.sqnorms("parameter")) == set(exact)
        with pytest.raises(RuntimeError, match="only norms were kept"):
            gradients.clip_(1.0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_clipped_and_weighted_sums(case, reduction):
    model, x, exact = case
    max_norm = float(sqnorms(exact).sqrt().median())
    with PerSampleGradients(model, loss_reduction=reduction) as gradients:
        run(model, x, reduction)
        norms = gradients.clip_(max_norm)
        assert relative_error(norms, sqnorms(exact).sqrt()) < EXACT
        expected = clipped(exact, max_norm, reduction == "mean")
        for name, p in model.named_parameters():
            assert relative_error(p.grad, expected[name]) < EXACT, name
        run(model, x, reduction)
        w = torch.tensor([0.5, -2.0, 0.0, 3.0])[: len(x)]
        gradients.weighted_sum_(w, release=False)
        for name, p in model.named_parameters():
            total = expected[name] + torch.tensordot(w.double(), exact[name], 1)
            assert relative_error(p.grad, total) < EXACT, name
        assert relative_error(gradients.norms(), norms) < EXACT


def test_a_released_batch_says_so(case):
    model, x, _ = case
    with PerSampleGradients(model) as gradients:
        with pytest.raises(RuntimeError, match="no gradients yet"):
            gradients.norms()
        run(model, x)
        with pytest.raises(ValueError, match=r"w must have shape \(\d,\)"):
            gradients.weighted_sum_(torch.ones(9))
        gradients.weighted_sum_(torch.ones(len(x)))
        with pytest.raises(RuntimeError, match="released"):
            gradients.sqnorms()


def test_gradients_themselves(case):
    model, x, exact = case
    with PerSampleGradients(model) as gradients:
        run(model, x)
        found = gradients.grads()
    for name, g in exact.items():
        assert relative_error(found[name], g) < EXACT, name


def test_inner_products_with_another_batch(case):
    model, x, exact = case
    y = x.flip(0)[:2] if x.is_floating_point() else text(2, 5, seed=1)
    other = flattened(looped(model, list(y.split(1)), half_square))
    with PerSampleGradients(model) as gradients:
        run(model, y)
        validation = gradients.take()
        run(model, x)
        assert relative_error(gradients.dots(validation), flattened(exact) @ other.T) < EXACT
        assert (
            relative_error(gradients.dots(validation, summed=True), flattened(exact) @ other.sum(0)) < EXACT
        )
        assert relative_error(gradients.dots(gradients).diagonal(), sqnorms(exact)) < EXACT


def test_one_projection_of_everything(case):
    model, x, exact = case
    whole = Projection(dim=flattened(exact).shape[1], k=16, seed=3)
    with PerSampleGradients(model) as gradients:
        run(model, x)
        assert relative_error(gradients.project(whole), whole(flattened(exact))) < EXACT
        with pytest.raises(ValueError, match="projection must have dim"):
            gradients.project(Projection(dim=5, k=2))


def test_a_projection_for_each_parameter():
    torch.manual_seed(0)
    model, x = Text().double(), text()
    exact = looped(model, list(x.split(1)), half_square)
    left, right = randn(3, 13, dtype=torch.float64), randn(2, 8, dtype=torch.float64, seed=1)
    chosen = {
        "head.weight": TwoSided(left, right),
        "words.weight": Projection(dim=13 * 8, k=5, seed=1),
        "inner.bias": Projection(dim=6, k=4, seed=1),
    }
    with PerSampleGradients(model) as gradients:
        run(model, x)
        found = gradients.project(chosen)
        with pytest.raises(ValueError, match="no followed parameter: heads"):
            gradients.project({"heads": chosen["head.weight"]})
    assert relative_error(found["head.weight"], (left @ exact["head.weight"] @ right.T).flatten(1)) < EXACT
    assert (
        relative_error(found["words.weight"], chosen["words.weight"](exact["words.weight"].flatten(1)))
        < EXACT
    )
    assert relative_error(found["inner.bias"], chosen["inner.bias"](exact["inner.bias"])) < EXACT


def test_float32_is_as_exact_as_the_loop(case):
    model, x, exact = case
    single = model.float()
    inputs = x.float() if x.is_floating_point() else x
    eager = sqnorms(looped(single, list(inputs.split(1)), half_square))
    with PerSampleGradients(single) as gradients:
        run(single, inputs)
        found = gradients.sqnorms()
    assert found.dtype == torch.float32
    assert relative_error(found, sqnorms(exact)) < max(2 * relative_error(eager, sqnorms(exact)), 1e-6)

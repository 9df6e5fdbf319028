import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.per_sample.models import Text, clipped, half_square, looped, sqnorms, text
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.testing import at_threads, randn, relative_error

EXACT = 1e-9


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 8), nn.LayerNorm(8))
            for _ in range(2)
        )
        self.head, self.reentrant = nn.Linear(8, 13), reentrant

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


@pytest.mark.parametrize("keep", ["factors", "norms"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks(reentrant, keep):
    torch.manual_seed(0)
    model, x = Checkpointed(reentrant).double(), text()
    exact = _loop_backward(model, x)
    with PerSampleGradients(model, loss_reduction="sum", keep=keep) as gradients:
        for _ in range(2):
            half_square(model, x).backward()
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
            assert gradients.unused() == []


def _loop_backward(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By `.backward()`: reentrant checkpoints do not go with `autograd.grad`."""
    rows = []
    for one in x.split(1):
        model.zero_grad()
        half_square(model, one).backward()
        rows.append({name: p.grad.clone() for name, p in model.named_parameters()})
    model.zero_grad()
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def test_a_checkpoint_still_drops_what_its_layers_take_in():
    model, seen = Checkpointed(False), []
    model.blocks[0][2].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    with PerSampleGradients(model):
        out = model(text())
        assert seen[0]() is None
        out.sum().backward()
        assert len(seen) == 2


def test_no_weight_gradient_is_computed():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    with PerSampleGradients(model) as gradients:
        out = model(randn(3, 6))
        leaves, nodes = [], [out.grad_fn]
        while nodes:
            node = nodes.pop()
            leaves += [node.variable] if hasattr(node, "variable") else []
            nodes += [parent for parent, _ in node.next_functions if parent is not None]
        parameters = {id(p) for p in model.parameters()}
        assert leaves
        assert not any(id(leaf) in parameters for leaf in leaves)
        out.sum().backward()
        assert gradients.unused() == []
        assert all(p.grad is None for p in model.parameters())


def test_requires_grad_comes_back_after_an_exception():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), PerSampleGradients(model):
        _fail(model(randn(2, 3)).sum())
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert not model._forward_hooks
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks
    model(randn(2, 3)).sum().backward()
    assert model[0].weight.grad is not None
    assert model[1].bias.grad is None


def _fail(loss: Tensor) -> None:
    loss.backward()
    raise ZeroDivisionError


def test_frozen_parameters_are_left_out():
    torch.manual_seed(0)
    model, x = Text().double(), text()
    for p in (model.words.weight, model.inner.weight, model.last.weight, model.first.bias):
        p.requires_grad_(False)
    exact = looped(model, list(x.split(1)), half_square)
    with PerSampleGradients(model, loss_reduction="sum") as gradients:
        assert "words" not in gradients.layers
        half_square(model, x).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
        assert set(gradients.sqnorms("parameter")) == set(exact)


def test_parameters_that_are_not_used_have_zero_gradients():
    model = Text()
    model.spare = nn.Linear(3, 3)
    with PerSampleGradients(model) as gradients:
        half_square(model, text(2)).backward()
        assert gradients.unused() == ["spare.weight", "spare.bias"]
        assert gradients.sqnorms("parameter")["spare.weight"].tolist() == [0, 0]
        gradients.clip_(1.0)
    assert model.spare.weight.grad is None


@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_micro_batches_add_up(pieces):
    torch.manual_seed(0)
    model, x = Text(tied=True).double(), text(4)
    exact = looped(model, list(x.split(1)), half_square)
    max_norm = float(sqnorms(exact).sqrt().median())
    expected = clipped(exact, max_norm, mean=False)
    with PerSampleGradients(model, loss_reduction="sum") as gradients:
        for piece in x.chunk(pieces):
            half_square(model, piece).backward()
            gradients.clip_(max_norm)
    for name, p in model.named_parameters():
        assert relative_error(p.grad, expected[name]) < EXACT


def test_backward_can_compute_its_gradients_too():
    torch.manual_seed(0)
    model, x = Text().double(), text()
    exact = looped(model, list(x.split(1)), half_square)
    with PerSampleGradients(model, loss_reduction="sum", backward_grads=True) as gradients:
        half_square(model, x).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
    for name, p in model.named_parameters():
        assert relative_error(p.grad, exact[name].sum(0)) < EXACT


def test_a_backward_outside_raises():
    model = nn.Sequential(nn.Linear(3, 2))
    with PerSampleGradients(model):
        loss = model(randn(2, 3)).sum()
    with pytest.raises(RuntimeError, match="ran outside of it"):
        loss.backward()


def test_evaluation_in_between_is_not_recorded():
    torch.manual_seed(0)
    model, x = Text().double(), text()
    exact = looped(model, list(x.split(1)), half_square)
    for keep in ("factors", "norms"):
        with PerSampleGradients(model, loss_reduction="sum", keep=keep) as gradients:
            loss = half_square(model, x)
            with torch.no_grad():
                model(text(2, 3))
            loss.backward()
            with torch.no_grad():
                model(text(2, 3))
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT


def test_autocast():
    torch.manual_seed(0)
    model, x = Text(), text(4, 6)
    exact = sqnorms(looped(model, list(x.split(1)), half_square))
    with PerSampleGradients(model, loss_reduction="sum") as gradients:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = half_square(model, x)
        loss.backward()
        norms = gradients.sqnorms()
        assert norms.dtype == torch.float32
        assert relative_error(norms, exact) < 0.05
        gradients.clip_(1.0)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_half_precision_of_large_gradients_does_not_overflow():
    """Opacus ghost norms are infinite for fp16 gradients of standard deviation 10."""
    layer = nn.Linear(64, 64).half()
    x, scale = randn(4, 32, 64, dtype=torch.float16), randn(4, 32, 64, seed=1) * 10
    with PerSampleGradients(layer, loss_reduction="sum") as gradients:
        (layer(x).float() * scale).sum().backward()
        found = gradients.sqnorms()
    g = scale.half().double()
    exact = (g.mT @ x.double()).square().sum((1, 2)) + g.sum(1).square().sum(1)
    assert relative_error(found, exact) < 1e-5


def test_compiled_models_run_eagerly_inside():
    torch.manual_seed(0)
    model, x = Text().double(), text()
    exact = looped(model, list(x.split(1)), half_square)
    compiled = torch.compile(model, backend="eager")
    half_square(compiled, x).backward()
    model.zero_grad()
    with PerSampleGradients(compiled, loss_reduction="sum") as gradients:
        half_square(compiled, x).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
        gradients.clip_(1e9)
    assert relative_error(model.head.weight.grad, exact["head.weight"].sum(0)) < EXACT


def test_same_bits_at_any_number_of_threads():
    torch.manual_seed(0)
    model, x = Text(tied=True), text(5, 7)

    def norms() -> Tensor:
        with PerSampleGradients(model) as gradients:
            half_square(model, x).backward()
            return gradients.sqnorms()

    one, *others = at_threads((1, 2), norms)
    assert all(torch.equal(one, other) for other in others)

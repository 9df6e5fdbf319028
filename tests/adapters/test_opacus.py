import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.models import Pictures, Text, half_square, looped, sqnorms, text
from unlearn_kernels.testing import randn, relative_error

opacus = pytest.importorskip("opacus")
from opacus.grad_sample import (  # noqa: E402
    GradSampleHooks,
    GradSampleHooksFastGradientClipping,
    GradSampleModule,
    GradSampleModuleFastGradientClipping,
)

from unlearn_adapters import opacus as adapter  # noqa: E402


class Plain(nn.Module):
    """What Opacus is right about: 3-D tensors, explicit positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(13, 8), nn.Embedding(9, 8)
        self.norm, self.line, self.head = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 13, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        return self.head(torch.tanh(self.line(self.norm(self.words(ids) + self.places(at)))))


@pytest.fixture
def installed():
    adapter.install()
    adapter.install()
    yield
    adapter.uninstall()


def ghost_norms(model: nn.Module, x: Tensor) -> Tensor:
    wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="mean", strict=False)
    (wrapped(x).float().square().flatten(1).sum(1) / 2).mean().backward()
    found = wrapped.get_norm_sample()
    wrapped.remove_hooks()
    return found


def test_ghost_norms_equal_opacus_where_it_is_right():
    torch.manual_seed(0)
    model, x = Plain(), text(4, 6)
    theirs = ghost_norms(model, x)
    adapter.install()
    try:
        ours = ghost_norms(model, x)
    finally:
        adapter.uninstall()
    exact = sqnorms(looped(model.double(), list(x.split(1)), half_square)).sqrt()
    assert relative_error(ours, theirs) < 1e-5
    assert relative_error(ours, exact) < 1e-6


def test_ghost_norms_are_right_where_opacus_is_not(installed):
    """4-D inputs (an empty dict), `[1, T]` positions (sizes that do not stack)."""
    torch.manual_seed(0)
    model, x = Text(), text(4, 6)
    exact = sqnorms(looped(model, list(x.split(1)), half_square)).sqrt()
    assert relative_error(ghost_norms(model, x), exact) < 1e-5
    adapter.uninstall()
    with pytest.raises((RuntimeError, AttributeError, ValueError)):
        ghost_norms(Text(), x)


def test_convolutions_and_norms_of_pictures(installed):
    torch.manual_seed(0)
    model, x = Pictures(), randn(3, 3, 9, 8)
    model.layers[2].inplace = False  # its hooks forbid what follows in place
    model.layers[6].requires_grad_(False)  # Opacus has nothing for transposed convolutions
    exact = sqnorms(looped(model, list(x.split(1)), half_square)).sqrt()
    assert relative_error(ghost_norms(model, x), exact) < 1e-5


def test_hooks_mode_forms_the_same_gradients(installed):
    torch.manual_seed(0)
    model, x = Text(), text(4, 6)
    exact = looped(model, list(x.split(1)), half_square)
    wrapped = GradSampleModule(model, loss_reduction="mean", strict=False)
    (wrapped(x).square().flatten(1).sum(1) / 2).mean().backward()
    for name, p in model.named_parameters():
        assert relative_error(p.grad_sample, exact[name]) < 1e-5, name


def test_transformers_classes(installed):
    transformers = pytest.importorskip("transformers")
    from tests.adapters.test_per_sample_models import gpt2, language_loss, llama, one_by_one, tokens

    for make in (gpt2, llama):
        torch.manual_seed(0)
        model, batch = make().train(), tokens()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if make is gpt2:
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        exact = sqnorms(looped(model, one_by_one(batch), language_loss)).sqrt()
        wrapped = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", strict=False)
        language_loss(wrapped, batch).backward()
        assert relative_error(wrapped.get_norm_sample(), exact) < 1e-5
    assert transformers


@pytest.mark.parametrize("mode", ["ghost", "hooks"])
def test_a_privacy_engine_trains_on_it(installed, mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))
    data = torch.utils.data.TensorDataset(randn(32, 6), torch.arange(32) % 3)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    made = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=0.5,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
        poisson_sampling=False,
    )
    wrapped, optimizer, *criterion, loader = made
    criterion = criterion[0] if criterion else nn.CrossEntropyLoss()
    for x, y in loader:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_uninstalling_puts_everything_back():
    names = ((GradSampleHooks, "GRAD_SAMPLERS"), (GradSampleHooksFastGradientClipping, "NORM_SAMPLERS"))
    before = [vars(owner)[name] for owner, name in names]
    hook = GradSampleHooks.capture_activations_hook
    adapter.install()
    assert vars(GradSampleHooks)["GRAD_SAMPLERS"] is not before[0]
    adapter.uninstall()
    assert [vars(owner)[name] for owner, name in names] == before
    assert GradSampleHooks.capture_activations_hook is hook

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.models import flattened, half_square, looped, sqnorms, text
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.testing import randn, relative_error

EXACT = 1e-9


class Twice(nn.Module):
    """Every kind of module, run twice, on tensors of different lengths."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 4)
        self.words.requires_grad_(kind == "embedding")
        self.kind = kind
        make = {
            "linear": lambda: nn.Linear(4, 4),
            "embedding": lambda: self.words,
            "norm": lambda: nn.LayerNorm(4),
            "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
        }
        self.layer = make[kind]()

    def forward(self, ids: Tensor) -> Tensor:
        if self.kind == "embedding":
            x, y = torch.sin(self.words(ids)), self.words(ids[:, :2])
        elif self.kind == "conv":
            x = self.layer(torch.sin(self.words(ids)).mT)
            y = self.layer(torch.tanh(x)).mT
            x = x.mT
        else:
            x = self.layer(torch.sin(self.words(ids)))
            y = self.layer(torch.tanh(x[:, :3]))
        return torch.cat([x, y], dim=1)


@pytest.mark.parametrize("keep", ["factors", "norms"])
@pytest.mark.parametrize("kind", ["linear", "embedding", "norm", "conv"])
def test_a_module_that_runs_twice(kind, keep):
    torch.manual_seed(0)
    model, x = Twice(kind).double(), text(3, 6)
    exact = looped(model, list(x.split(1)), half_square)
    with PerSampleGradients(model, loss_reduction="sum", keep=keep) as gradients:
        half_square(model, x).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT
        if keep == "factors":
            assert relative_error(gradients.dots(gradients), flattened(exact) @ flattened(exact).T) < EXACT
            gradients.weighted_sum_(torch.tensor([1.0, 2.0, -1.0]))
            for name, p in model.named_parameters():
                if p.requires_grad or p.grad is not None:
                    expected = torch.tensordot(torch.tensor([1.0, 2.0, -1.0]).double(), exact[name], 1)
                    assert relative_error(p.grad, expected) < EXACT


def test_the_cross_term_of_a_tied_weight_is_not_small():
    torch.manual_seed(0)
    words, head = nn.Embedding(13, 4), nn.Linear(4, 13, bias=False)
    head.weight = words.weight
    model = nn.Sequential(words, nn.Tanh(), head).double()
    x = text(3, 5)
    exact = sqnorms(looped(model, list(x.split(1)), half_square))
    with PerSampleGradients(model, loss_reduction="sum") as gradients:
        half_square(model, x).backward()
        parts = gradients.batch._uses["0.weight"]
        without = sum(part.sqnorms() for part in parts)
        assert relative_error(gradients.sqnorms(), exact) < EXACT
        assert relative_error(without, exact) > 0.05


def test_a_bias_shared_by_two_layers():
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    two.bias = one.bias
    model, x = nn.Sequential(one, nn.Tanh(), two).double(), randn(3, 2, 4, dtype=torch.float64)
    exact = looped(model, list(x.split(1)), half_square)
    for keep in ("factors", "norms"):
        with PerSampleGradients(model, loss_reduction="sum", keep=keep) as gradients:
            half_square(model, x).backward()
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT


def test_two_forwards_and_one_backward_are_one_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = randn(3, 4, dtype=torch.float64), randn(3, 4, dtype=torch.float64, seed=1)

    def contrast(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
        return (model(pair[0]) * model(pair[1])).sum()

    exact = looped(model, list(zip(x.split(1), y.split(1), strict=True)), contrast)
    for keep in ("factors", "norms"):
        with PerSampleGradients(model, loss_reduction="sum", keep=keep) as gradients:
            contrast(model, (x, y)).backward()
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT

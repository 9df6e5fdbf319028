import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.models import half_square, looped, sqnorms, text
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.testing import randn, relative_error

EXACT = 1e-9


def check(model: nn.Module, x: Tensor, **options) -> None:
    exact = looped(model, list(x.split(1)), half_square)
    with PerSampleGradients(model, loss_reduction="sum", **options) as gradients:
        half_square(model, x).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT


class Positions(nn.Module):
    """An embedding of positions, looked up in one of three shapes."""

    def __init__(self, shape: str) -> None:
        super().__init__()
        self.places, self.line, self.shape = nn.Embedding(9, 4), nn.Linear(4, 3), shape

    def forward(self, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        at = {"T": at, "1T": at[None], "BT": at.expand_as(ids)}[self.shape]
        return self.line(torch.sin(self.places(at) + ids[..., None] / 7))


@pytest.mark.parametrize(("shape", "T"), [("T", 5), ("1T", 1), ("1T", 4), ("BT", 1), ("BT", 4)])
def test_positions_that_all_samples_share(shape, T):
    check(Positions(shape).double(), text(4, T))


def test_positions_that_could_be_one_id_a_sample_are_asked_about():
    model = Positions("T").double()
    for x in (text(5, 5), text(5, 1)):
        with (
            PerSampleGradients(model),
            pytest.raises(ValueError, match=r"places: ids \(\d,\) may be positions"),
        ):
            half_square(model, x)
        check(model, x, layout={"places": "broadcast"})


def test_one_id_a_sample():
    model = nn.Sequential(nn.Embedding(13, 4), nn.Linear(4, 2)).double()
    check(model, torch.tensor([3, 1, 4, 1]))
    check(model, torch.arange(4), layout={"0": "samples"})


def test_inputs_of_more_dimensions_are_summed_over():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm((2, 4)), nn.Linear(4, 2)).double()
    check(model, randn(3, 2, 4, 2, 5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 1, 3), (4, 3)])
def test_an_input_that_all_samples_share_must_be_named(shape):
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.make, self.line = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(torch.tanh(x + self.make(torch.ones(shape, dtype=x.dtype))))

    model, x = Shift().double(), randn(3, 4, 4, dtype=torch.float64)
    with (
        PerSampleGradients(model),
        pytest.raises(ValueError, match=r"make: output \(.*\) does not have the 3"),
    ):
        model(x)
    check(model, x, layout={"make": "broadcast"})


class Folding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm, self.head = nn.Embedding(13, 4), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(torch.sin(self.words(ids.flatten())))).view(*ids.shape, 3)


def test_a_flattened_batch_is_refused_or_unfolded():
    model = Folding().double()
    named = {"words": "folded", "norm": "folded"}
    with (
        PerSampleGradients(model, layout=named),
        pytest.raises(ValueError, match=r"head: output \(12, 3\) does not have the 4"),
    ):
        half_square(model, text(4, 3))
    check(model, text(4, 3), layout=named | {"head": "folded"})


def test_samples_in_the_second_dimension():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.line = nn.Embedding(13, 4), nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.line(torch.sin(self.words(ids)))

    model, x = Turned().double(), text(4, 5)
    exact = looped(model, list(x.split(1)), half_square)
    with PerSampleGradients(model, loss_reduction="sum", batch_first=False) as gradients:
        half_square(model, x.T).backward()
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < EXACT


def test_empty_and_single_batches():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    check(model, randn(1, 3, dtype=torch.float64))
    with PerSampleGradients(model, loss_reduction="sum") as gradients:
        half_square(model, torch.zeros(0, 3, dtype=torch.float64)).backward()
        assert gradients.sqnorms().shape == (0,)


def test_non_contiguous_inputs():
    model = nn.Linear(5, 4).double()
    check(model, randn(5, 6, 3, dtype=torch.float64).permute(2, 1, 0))
    check(model, randn(3, 1, 5, dtype=torch.float64).expand(3, 4, 5))


def test_a_batch_of_another_size_must_be_named():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    x = randn(4, 3, dtype=torch.float64)
    with PerSampleGradients(model, batch_size=3), pytest.raises(ValueError, match="3 samples"):
        model(x)
    with PerSampleGradients(model), pytest.raises(ValueError, match="ran outside of the model's own forward"):
        model[0](x)
    with PerSampleGradients(model, batch_size=4, loss_reduction="sum") as gradients:
        model[0](x).square().sum().backward()
        assert gradients.sqnorms().shape == (4,)


def test_layouts_are_checked():
    with pytest.raises(ValueError, match="layout names 'x', which is no module"):
        PerSampleGradients(nn.Sequential(nn.Linear(2, 2)), layout={"x": "folded"})
    with pytest.raises(ValueError, match=r"layout\['0'\] must be one of"):
        PerSampleGradients(nn.Sequential(nn.Linear(2, 2)), layout={"0": "other"})

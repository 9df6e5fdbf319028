import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.models import half_square, looped, sqnorms, text
from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.testing import randn, relative_error


class Direct(nn.Module):
    """Parameters of its own, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.places = nn.Parameter(torch.randn(1, 6, 4))
        self.line = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.line(x)], dim=1)
        return torch.sin(x + scale * self.places)


def test_modules_without_a_kernel_are_named():
    model = nn.Sequential(Direct(), nn.GRU(4, 4, batch_first=True))
    with pytest.raises(ValueError, match=r"0 \(Direct; token, places\): there is no kernel") as caught:
        PerSampleGradients(model)
    assert "1 (GRU; weight_ih_l0" in str(caught.value)
    assert "pass fallback='vmap'" in str(caught.value)
    model[1].requires_grad_(False)
    model[0].token.requires_grad_(False)
    model[0].places.requires_grad_(False)
    assert PerSampleGradients(model).layers == {"0.line": "linear"}


def test_the_fallback_is_exact():
    torch.manual_seed(0)
    model, x = nn.Sequential(Direct(), nn.Linear(4, 3)).double(), randn(3, 5, 4, dtype=torch.float64)
    exact = looped(model, list(x.split(1)), half_square)
    for keep in ("factors", "norms"):
        with PerSampleGradients(model, loss_reduction="sum", fallback="vmap", keep=keep) as gradients:
            assert gradients.layers == {"0": "vmap", "0.line": "linear", "1": "linear"}
            half_square(model, x).backward()
            assert relative_error(gradients.sqnorms(), sqnorms(exact)) < 1e-9


def test_attention_uses_its_projection_without_calling_it():
    torch.manual_seed(0)

    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.line = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.line(self.attention(x, x, x, need_weights=False)[0])

    model, x = Attending().double(), randn(3, 5, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="attention \\(MultiheadAttention; in_proj_weight"):
        PerSampleGradients(model)
    exact = looped(model, list(x.split(1)), half_square)
    with PerSampleGradients(model, loss_reduction="sum", fallback="vmap") as gradients:
        half_square(model, x).backward()
        assert gradients.unused() == []
        assert relative_error(gradients.sqnorms(), sqnorms(exact)) < 1e-9


def test_the_fallback_notices_arguments_that_are_no_samples():
    class Adding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return x * self.scale + at

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.adding = Adding()

        def forward(self, x: Tensor) -> Tensor:
            return self.adding(x, torch.arange(3.0))

    model = Outer()
    with PerSampleGradients(model, fallback="vmap"), pytest.raises(RuntimeError, match="gave other outputs"):
        model(randn(3, 3)).sum().backward()


class BorrowedHead(nn.Module):
    """Multiplies by the embedding's weight without a module."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) @ self.words.weight.T


def test_a_parameter_used_outside_of_its_module_is_noticed():
    model = BorrowedHead()
    with (
        PerSampleGradients(model),
        pytest.raises(ValueError, match=r"words\.weight is used directly by __get__"),
    ):
        model(text())
    assert model.words.weight.requires_grad
    fused = nn.Sequential(nn.Linear(3, 3))
    fused.forward = lambda x: nn.functional.linear(x, fused[0].weight)
    with PerSampleGradients(fused), pytest.raises(ValueError, match=r"0\.weight is used directly by linear"):
        fused(randn(2, 3))


def test_looking_at_a_parameter_is_no_use_of_it():
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            assert self.line.weight.detach().isfinite().all()
            return self.line(x.to(self.line.weight.dtype).to(self.line.weight.device))

    model = Looking()
    with PerSampleGradients(model) as gradients:
        model(randn(2, 3)).sum().backward()
        assert gradients.sqnorms().shape == (2,)


def test_subclasses_that_compute_something_else():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class LoudRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x, (4,), eps=self.eps) * self.weight**2

    with pytest.raises(ValueError, match=r"0 \(Scaled; weight, bias\): it overrides Linear.forward"):
        PerSampleGradients(nn.Sequential(Scaled(3, 3)))
    with pytest.raises(ValueError, match="its output is not the normalised input times its scale"):
        PerSampleGradients(nn.Sequential(LoudRMSNorm()))


def test_what_mixes_samples():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    with pytest.raises(ValueError, match="1 \\(BatchNorm1d\\) mixes the samples"), PerSampleGradients(model):
        pass
    with PerSampleGradients(model.eval()):
        pass
    for embedding in (nn.Embedding(3, 2, scale_grad_by_freq=True), nn.Embedding(3, 2, max_norm=1.0)):
        with pytest.raises(ValueError, match="Embedding; weight"):
            PerSampleGradients(nn.Sequential(embedding))


def test_arguments_are_checked():
    model = nn.Sequential(nn.Linear(2, 2))
    for name in ("loss_reduction", "keep", "fallback"):
        with pytest.raises(ValueError, match=f"{name} must be one of"):
            PerSampleGradients(model, **{name: "other"})
    with pytest.raises(ValueError, match="no trainable parameters"):
        PerSampleGradients(nn.Sequential(nn.Linear(2, 2).requires_grad_(False)))
    with PerSampleGradients(model) as gradients:
        model(torch.ones(2, 2)).sum().backward()
        with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
            gradients.clip_(0)
        with pytest.raises(ValueError, match="by must be 'sample' or 'parameter'"):
            gradients.sqnorms("layer")
        with pytest.raises(RuntimeError, match="already entered"), gradients:
            pass

"""`unlearn_adapters.trak` in TRAK itself: what a TRAKer stores with it, and how near its scores come to exact ones."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.per_sample.models import flattened, looped
from unlearn_kernels.influence import Projection
from unlearn_kernels.testing import randn, relative_error

trak = pytest.importorskip("trak")

from trak.projectors import BasicProjector, CudaProjector, NoOpProjector  # noqa: E402

from unlearn_adapters import fast_jl  # noqa: E402
from unlearn_adapters.trak import Projector, install, uninstall  # noqa: E402

N, WIDTH, CLASSES = 24, 6, 3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()


def data() -> tuple[Tensor, Tensor]:
    return randn(N, WIDTH), torch.arange(N) % CLASSES


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def traker(path: Path, projector: object, regularization: float) -> object:
    return trak.TRAKer(
        model=model(),
        task="image_classification",
        train_set_size=N,
        save_dir=str(path),
        projector=projector,
        lambda_reg=regularization,
        device="cpu",
        use_half_precision=False,
        logging_level=40,
    )


def scored(path: Path, projector: object, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """The gradients that TRAK has stored, `sqrt(scale)` times too long, and the scores of five rows."""
    x, y = data()
    one = traker(path, projector, 0.1 * scale)
    one.load_checkpoint(model().state_dict(), model_id=0)
    for part in torch.arange(N).split(7):
        one.featurize(batch=[x[part], y[part]], num_samples=len(part))
    stored = torch.tensor(one.saver.current_store["grads"][:]).clone()
    one.finalize_features()
    one.start_scoring_checkpoint("few", model().state_dict(), model_id=0, num_targets=5)
    one.score(batch=[x[:5], y[:5]], num_samples=5)
    return stored, torch.tensor(one.finalize_scores("few"))


def test_traker_stores_projected_gradients(tmp_path: Path) -> None:
    projector = Projector(size(model()), 40, 3, "rademacher", "cpu")
    stored, _ = scored(tmp_path / "ours", projector)
    exact, _ = scored(tmp_path / "none", NoOpProjector(proj_dim=size(model()), device="cpu"))
    assert relative_error(stored, 40**0.5 * Projection(size(model()), 40, seed=3)(exact.double())) < 1e-5


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
def test_scores_come_as_near_as_traks_own(tmp_path: Path, kind: str) -> None:
    """TRAK scales scores arbitrarily: cosines with those of unprojected gradients."""
    dim = size(model())
    _, exact = scored(tmp_path / "none", NoOpProjector(proj_dim=dim, device="cpu"))
    _, ours = scored(tmp_path / "ours", Projector(dim, 2048, 0, kind, "cpu"), 2048)
    basic = BasicProjector(dim, 2048, 0, "normal" if kind == "sjlt" else kind, "cpu")
    _, theirs = scored(tmp_path / "theirs", basic, 2048)
    near, base = (torch.cosine_similarity(x.flatten(), exact.flatten(), 0) for x in (ours, theirs))
    assert base > 0.99
    assert near > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_projector_of_tensors_and_of_parameters(dtype: torch.dtype) -> None:
    net = model().double()
    grads = looped(net, list(randn(5, 1, WIDTH, dtype=torch.float64)), lambda m, x: m(x).square().sum())
    grads = {name: g.to(dtype) for name, g in grads.items()}
    whole = flattened(grads)
    projector = Projector(size(net), 100, 7, "normal", "cpu", max_batch_size=16, block_size=10)
    expected = 10 * Projection(size(net), 100, "gaussian", 7 + (5 << 31))(whole.double())
    allowed = max(1e-6, float(torch.finfo(dtype).eps)) if dtype != torch.float64 else 1e-12
    for given in (whole, grads):
        y = projector.project(given, model_id=5)
        assert y.dtype == dtype
        assert relative_error(y, expected) < allowed
    assert (
        Projector(size(net), 100, 7, "normal", "cpu", dtype=torch.float32).project(whole, 5).dtype
        == torch.float32
    )
    one, two = (projector.project(whole, model_id=i) for i in (0, 1))
    assert relative_error(one, two) > 0.5
    projector.free_memory()


def test_fast_jl_functions() -> None:
    """No rounding to float16, no multiple of 512, no scale; every name is there."""
    x = randn(9, 300) * 1e5
    for kind, name in (("rademacher", "rademacher"), ("gaussian", "normal")):
        expected = 11**0.5 * Projection(300, 11, kind, 4)(x.double())
        for rows in (8, 16, 32):
            function = getattr(fast_jl, f"project_{name}_{rows}")
            y = function(x, 11, 4, 108)
            assert y.dtype == torch.float32
            assert relative_error(y, expected) < 1e-6
            assert torch.equal(y, function(x, 11, 4, 132))
            assert function(x.bfloat16(), 11, 4, 0).dtype == torch.float32
    with pytest.raises(ValueError, match=r"input must be \(B, D\), got \(300,\)"):
        fast_jl.project_rademacher_8(x[0], 11, 4)


def test_cuda_projector_calls_the_installed_functions() -> None:
    """On a machine without a GPU its constructor refuses; what it does afterwards is plain."""
    projector = CudaProjector.__new__(CudaProjector)
    projector.grad_dim, projector.proj_dim, projector.seed = 300, 64, 2
    projector.proj_type, projector.max_batch_size, projector.num_sms = (
        trak.projectors.ProjectionType.normal,
        16,
        108,
    )
    x, before = randn(12, 300), sys.modules.get("fast_jl")
    install()
    install()
    try:
        y = projector.project(x, model_id=1)
    finally:
        uninstall()
    assert relative_error(y, 8 * Projection(300, 64, "gaussian", 10002)(x.double())) < 1e-6
    assert sys.modules.get("fast_jl") is before
    uninstall()


def test_refusals() -> None:
    for call, message in (
        (lambda: Projector(9, 4, -1, "normal", "cpu"), "seed must be between 0 and"),
        (lambda: Projector(9, 4, 0, "uniform", "cpu"), "kind must be one of"),
        (lambda: Projector(9, 4, 0, "normal", "cpu").project(torch.ones(2, 9), -1), "model_id must be"),
        (lambda: Projector(9, 4, 0, "normal", "cpu").project(torch.ones(2, 8), 0), "9 as its last dimension"),
        (lambda: Projector(9, 4, 0, "normal", "cpu").project({"w": torch.ones(2, 8)}, 0), "9 coordinates"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_positional_arguments_are_those_of_basic_projector() -> None:
    given = (50, 16, 0, "normal", "cpu", 100, torch.float64)
    g = randn(2, 50)
    assert Projector(*given).project(g, 0).dtype == BasicProjector(*given).dtype == torch.float64
    with pytest.raises(ValueError, match="parts must make up 50 coordinates, got 0"):
        Projector(*given).project({}, 0)

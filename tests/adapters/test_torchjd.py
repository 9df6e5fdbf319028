import pytest
import torch
import torchjd.autojac
from torch import Tensor, nn
from torchjd import aggregation as theirs

from unlearn_adapters import torchjd as adapter
from unlearn_kernels import surgery
from unlearn_kernels.testing import randn, relative_error

SHAPES = ((7, 5), (), (129,), (3, 4, 2), (1,))
GRAMIAN = {
    "AlignedMTL": theirs.AlignedMTL,
    "CAGrad": lambda: theirs.CAGrad(c=0.5),
    "DualProj": theirs.DualProj,
    "GradVac": theirs.GradVac,
    "IMTLG": theirs.IMTLG,
    "Krum": lambda: theirs.Krum(1, 1),
    "MGDA": theirs.MGDA,
    "PCD": theirs.PCD,
    "PCGrad": theirs.PCGrad,
    "UPGrad": theirs.UPGrad,
}
OTHERS = {
    "Constant": lambda: theirs.Constant(torch.tensor([0.5, 2.0, -1.0, 0.25])),
    "ConFIG": theirs.ConFIG,
    "ConFIG preferring": lambda: theirs.ConFIG(torch.tensor([0.5, 2.0, 1.0, 0.25])),
    "GradDrop": theirs.GradDrop,
    "Mean": theirs.Mean,
    "NashMTL": lambda: theirs.NashMTL(4, optim_niter=100),
    "Random": theirs.Random,
    "Sum": theirs.Sum,
    "TrimmedMean": lambda: theirs.TrimmedMean(1),
}
ALL = GRAMIAN | OTHERS


def parameters(dtype: torch.dtype = torch.float32, sets: int = 4) -> list[nn.Parameter]:
    """Parameters with Jacobians whose rows conflict with the first."""
    made = []
    for i, shape in enumerate(SHAPES):
        p = nn.Parameter(torch.zeros(shape, dtype=dtype))
        jac = randn(sets, *shape, seed=i, dtype=torch.float64)
        jac[1:] -= 0.3 * jac[:1]
        p.jac = jac.to(dtype)
        made.append(p)
    return made


def run(call, tensors, make, **options) -> tuple[Tensor | None, Tensor]:
    torch.manual_seed(3)
    weights = call(tensors, make(), **options)
    return weights, torch.cat([p.grad.double().flatten() for p in tensors])


@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")
@pytest.mark.parametrize("name", ALL)
def test_gradients_and_weights_are_theirs(name):
    expected_weights, expected = run(torchjd.autojac.jac_to_grad, parameters(), ALL[name])
    ours = parameters()
    weights, found = run(adapter.jac_to_grad, ours, ALL[name])
    assert relative_error(found, expected) < 1e-5
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        assert relative_error(weights, expected_weights) < 1e-5
        assert weights.dtype == expected_weights.dtype
    assert not any(hasattr(p, "jac") for p in ours)


@pytest.mark.parametrize("name", ["UPGrad", "MGDA"])
def test_gradients_that_exist_are_added_to(name):
    before = [randn(*shape, seed=50 + i) for i, shape in enumerate(SHAPES)]
    both = []
    for call in (torchjd.autojac.jac_to_grad, adapter.jac_to_grad):
        tensors = parameters()
        for p, g in list(zip(tensors, before, strict=True))[::2]:
            p.grad = g.clone()
        kept = tensors[0].grad
        both.append(run(call, tensors, GRAMIAN[name], retain_jac=True)[1])
        assert tensors[0].grad is kept
        assert all(p.jac.shape == (4, *p.shape) for p in tensors)
    assert relative_error(both[1], both[0]) < 1e-5


@pytest.mark.parametrize("name", ["UPGrad", "DualProj", "CAGrad", "IMTLG", "AlignedMTL", "ConFIG", "MGDA"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_right_where_theirs_fails(name, dtype):
    ours = parameters(dtype)
    double = parameters(torch.float64)
    for p, q in zip(ours, double, strict=True):
        q.jac = p.jac.double()
    exact = run(torchjd.autojac.jac_to_grad, double, ALL[name])[1]
    _, found = run(adapter.jac_to_grad, ours, ALL[name])
    assert relative_error(found, exact.to(dtype)) < 2 * torch.finfo(dtype).eps
    assert all(p.grad.dtype == dtype for p in ours)


def test_nothing_is_concatenated(monkeypatch):
    monkeypatch.setattr(torch, "concat", None)
    monkeypatch.setattr(torch, "cat", None)
    tensors = parameters()
    storage = tensors[0].jac.untyped_storage().data_ptr()
    seen = []
    gramian = surgery.gramian
    monkeypatch.setattr(
        surgery, "gramian", lambda sets: seen.append(sets[0][0].untyped_storage().data_ptr()) or gramian(sets)
    )
    adapter.jac_to_grad(tensors, theirs.UPGrad())
    assert seen == [storage]


def test_install_replaces_and_uninstall_puts_back():
    before = torchjd.autojac.jac_to_grad
    adapter.install()
    adapter.install()
    try:
        assert torchjd.autojac.jac_to_grad is adapter.jac_to_grad
        run(torchjd.autojac.jac_to_grad, parameters(), theirs.GradDrop)
    finally:
        adapter.uninstall()
    assert torchjd.autojac.jac_to_grad is before


def test_hooks_that_ask_for_the_matrix_get_it():
    seen = []
    aggregator = theirs.UPGrad()
    aggregator.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    adapter.jac_to_grad(parameters(), aggregator)
    assert seen == [(4, sum(p.numel() for p in parameters()))]


def test_refusals_are_theirs():
    with pytest.raises(ValueError, match="cannot be empty"):
        adapter.jac_to_grad([], theirs.UPGrad())
    with pytest.raises(ValueError, match="`jac` fields were not populated"):
        adapter.jac_to_grad([nn.Parameter(torch.zeros(2))], theirs.UPGrad())
    with pytest.raises(ValueError, match="optimize_gramian_computation=True"):
        adapter.jac_to_grad(parameters(), theirs.ConFIG(), optimize_gramian_computation=True)
    with pytest.raises(ValueError, match="must have weights that depend on the Gramian alone, got GradDrop"):
        adapter.as_rule(theirs.GradDrop())


def test_an_aggregator_is_a_rule():
    J = randn(3, 20, dtype=torch.float64)
    gramians = torch.stack([J @ J.T, torch.full((3, 3), torch.nan), 2 * torch.eye(3, dtype=torch.float64)])
    found = surgery.weights(gramians, adapter.as_rule(theirs.UPGrad()))
    assert relative_error(found[0], theirs.UPGrad().gramian_weighting(gramians[0])) < 1e-12
    assert found[1].isnan().all()
    assert relative_error(found[2], torch.full((3,), 1 / 3)) < 1e-6

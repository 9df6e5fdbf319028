"""The weights of TorchJD for the same Gramian, to 1e-5, wherever both are defined."""

import cvxpy
import pytest
import torch
from torchjd import aggregation as theirs

from tests.surgery.gramians import dependent, jacobian
from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules
from unlearn_kernels.testing import relative_error

SEED = 7
pytestmark = [
    pytest.mark.filterwarnings("ignore:You are solving a parameterized problem"),
    pytest.mark.filterwarnings("ignore:Solution may be inaccurate"),  # than 1e-13
]


def drawn(make):
    return lambda: make(torch.Generator().manual_seed(SEED))


PAIRS = {
    "pcgrad": (drawn(rules.PCGrad), theirs.PCGradWeighting),
    "gradvac": (drawn(rules.GradVac), theirs.GradVacWeighting),
    "mgda": (lambda: rules.MGDA(iterations=100), theirs.MGDAWeighting),
    "cagrad": (lambda: rules.CAGrad(c=0.5), lambda: theirs.CAGradWeighting(c=0.5)),
    "cagrad far": (lambda: rules.CAGrad(c=2.0), lambda: theirs.CAGradWeighting(c=2.0)),
    "imtl_g": (rules.IMTLG, theirs.IMTLGWeighting),
    "aligned_mtl": (rules.AlignedMTL, theirs.AlignedMTLWeighting),
    "aligned_mtl median": (
        lambda: rules.AlignedMTL(scale="median"),
        lambda: theirs.AlignedMTLWeighting(scale_mode="median"),
    ),
    "aligned_mtl rmse": (
        lambda: rules.AlignedMTL(scale="rmse"),
        lambda: theirs.AlignedMTLWeighting(scale_mode="rmse"),
    ),
    "upgrad": (rules.UPGrad, theirs.UPGradWeighting),
    "dualproj": (rules.DualProj, theirs.DualProjWeighting),
}


@pytest.fixture(autouse=True)
def _exact_cone_solver(monkeypatch):
    """At its default tolerance Clarabel's weights are right to 1e-4 only."""
    solve = cvxpy.Problem.solve

    def tight(problem, solver):
        return solve(problem, solver, tol_gap_abs=1e-13, tol_gap_rel=1e-13, tol_feas=1e-13)

    monkeypatch.setattr(
        theirs._cagrad.cp.Problem, "solve", lambda p, *a, **k: tight(p, *a) if a else solve(p, **k)
    )


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("name", PAIRS)
def test_weights_are_theirs(name, K):
    ours, other = (make() for make in PAIRS[name])
    torch.manual_seed(SEED)
    for seed in range(3):
        J = jacobian(K, seed=seed)
        assert relative_error(ours(J @ J.T), other(J @ J.T)) < 1e-5


@pytest.mark.parametrize("K", [2, 3])
def test_exact_mgda_is_where_their_frank_wolfe_goes(K):
    J = jacobian(K)
    other = theirs.MGDAWeighting(epsilon=1e-9, max_iters=20_000)
    assert relative_error(surgery.weights(J @ J.T, "mgda"), other(J @ J.T)) < 1e-5


@pytest.mark.parametrize("K", range(2, 9))
@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "mgda", "imtl_g", "upgrad", "dualproj"])
def test_weights_of_dependent_gradients_are_theirs(name, K):
    ours, other = (make() for make in PAIRS[name])
    torch.manual_seed(SEED)
    J = dependent(K)
    assert relative_error(ours(J @ J.T), other(J @ J.T)) < 1e-5


@pytest.mark.parametrize("K", range(1, 9))
def test_combinations_are_theirs(K):
    J = jacobian(K)
    G = J @ J.T
    assert relative_error(surgery.weights(G, "config") @ J, theirs.ConFIG()(J)) < 1e-9
    p = torch.arange(1.0, K + 1, dtype=torch.float64)
    preferred = surgery.weights(G, "config", preference=p.tolist())
    assert relative_error(preferred @ J, theirs.ConFIG(p)(J)) < 1e-9
    if K > 1:  # theirs is not defined for one task
        found = surgery.weights(G, "nash_mtl") @ J
        assert relative_error(found, theirs.NashMTL(K, optim_niter=200)(J)) < 1e-5
    assert torch.equal(surgery.weights(G, "mean"), theirs.MeanWeighting()(J))
    assert torch.equal(surgery.weights(G, "sum"), theirs.SumWeighting()(J))
    assert torch.equal(surgery.weights(G, "constant", values=p.tolist()), theirs.ConstantWeighting(p)(J))

"""Every rule against its definition on vectors."""

import math

import pytest
import torch
from torch import Tensor

from tests.surgery.gramians import dependent, jacobian
from tests.surgery.weighing import MANY, PAIRS, PLAIN, SIZES, weigh
from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules
from unlearn_kernels.testing import relative_error


def test_all_rules_are_here():
    assert sorted(rules.RULES) == sorted([*PAIRS, *MANY, *PLAIN])


@pytest.mark.parametrize("conflict", [True, False])
def test_rules_of_two(conflict):
    f, r = jacobian(2)
    r = r if conflict == (f @ r < 0) else -r
    G = torch.stack([f, r]) @ torch.stack([f, r]).T
    cosine = f @ r / f.norm() / r.norm()

    def result(name, **more):
        w = weigh(name, G, **more)
        return w[0] * f + w[1] * r

    projected = f - (f @ r) / (r @ r) * r if conflict else f
    assert relative_error(result("agem"), projected) < 1e-14
    assert relative_error(result("gru"), projected) < 1e-14
    clip = 0.5 * float(cosine.abs())
    rectified = f + f.norm() * clip / r.norm() * r if conflict else f
    assert relative_error(result("gru", cosine_clip=clip), rectified) < 1e-14
    assert relative_error(result("blur"), r + (1 - (r @ f) / (f @ f)) * f) < 1e-14
    upper = f + (0.3 - (r @ f) / (r @ r)) * r
    assert relative_error(result("blur", gamma=0.3, lower=False), upper) < 1e-14
    assert relative_error(result("ngdiff"), r / r.norm() - f / f.norm()) < 1e-14
    assert relative_error(result("ngdiff", ascend=False), r / r.norm() + f / f.norm()) < 1e-14
    w = weigh("munba", G)
    assert (w > 0).all()
    assert relative_error(G @ w, 1 / w) < 1e-13


def test_gru_removes_a_strong_conflict_in_part_only():
    f, r = torch.tensor([1.0, 0.0]), torch.tensor([-3.0, 0.3])
    J = torch.stack([f, r]).double()
    w = weigh("gru", J @ J.T, cosine_clip=0.5)
    assert w[1] == 0.5 / J[1].norm()
    assert (w @ J) @ J[1] < 0


def test_zero_gradients_of_two():
    one, zero = torch.tensor([[4.0, 0], [0, 0]]), torch.tensor([[0, 0], [0, 4.0]])
    for name in ("agem", "gru"):
        assert weigh(name, one).tolist() == [1, 0]
        assert weigh(name, zero).tolist() == [1, 0]
    assert weigh("blur", one).tolist() == [1, 1]
    assert weigh("blur", zero).tolist() == [0, 1]
    assert weigh("blur", one, lower=False).tolist() == [1, 0]
    assert weigh("ngdiff", one).tolist() == [-0.5, 0]
    for G in (one, zero, torch.zeros(2, 2), torch.tensor([[4.0, -8], [-8, 16]])):
        assert weigh("munba", G).tolist() == [pytest.approx(0.1), 1]
    assert weigh("munba", one, forget=0.3)[0] == 0.3


def pcgrad(J: Tensor, orders: list[list[int]]) -> Tensor:
    rows = J.clone()
    for i, order in enumerate(orders):
        for j in order:
            if i != j and rows[i] @ J[j] < 0:
                rows[i] -= (rows[i] @ J[j]) / (J[j] @ J[j]) * J[j]
    return rows.sum(0)


@pytest.mark.parametrize("K", SIZES)
def test_pcgrad(K):
    J = jacobian(K)
    fixed = pcgrad(J, [list(range(K))] * K)
    assert relative_error(weigh("pcgrad", J @ J.T) @ J, fixed) < 1e-12
    draw = torch.Generator().manual_seed(5)
    drawn = pcgrad(J, [torch.randperm(K, generator=draw).tolist() for _ in range(K)])
    found = weigh("pcgrad", J @ J.T, generator=torch.Generator().manual_seed(5)) @ J
    assert relative_error(found, drawn) < 1e-12


@pytest.mark.parametrize("K", [2, 3, 5])
def test_gradvac_raises_cosines_to_their_targets(K):
    J = jacobian(K)
    rule = rules.GradVac(beta=0.25)
    targets = torch.zeros(K, K, dtype=torch.float64)
    for step in range(3):
        J = J + 0.3 * jacobian(K, seed=step + 1)
        rows = J.clone()
        for i in range(K):
            for j in range(K):
                if i == j:
                    continue
                cosine = torch.cosine_similarity(rows[i], J[j], 0)
                target = targets[i, j].clone()
                targets[i, j] += 0.25 * (cosine - targets[i, j])
                if cosine < target:
                    a, b = math.acos(cosine), math.acos(target)
                    rows[i] = rows[i] + rows[i].norm() / J[j].norm() * math.sin(a - b) / math.sin(b) * J[j]
                    assert abs(torch.cosine_similarity(rows[i], J[j], 0) - target) < 1e-9
        assert relative_error(rule(J @ J.T) @ J, rows.sum(0)) < 1e-9
        assert relative_error(rule.targets, targets) < 1e-9


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("make", [jacobian, dependent])
def test_mgda_is_the_shortest_of_the_hull(K, make):
    J = make(K)
    w = weigh("mgda", J @ J.T)
    assert (w >= 0).all()
    assert abs(w.sum() - 1) < 1e-14
    # Optimal if and only if no gradient goes less far along it than itself.
    g = w @ J
    assert (J @ g - g @ g).min() > -1e-9 * (J @ J.T).diagonal().max()


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("c", [0.0, 0.5, 2.0])
def test_cagrad_gains_most_for_the_worst_off(K, c):
    J = jacobian(K)
    mean = J.mean(0)
    w = weigh("cagrad", J @ J.T, c=c)
    g = w @ J
    assert (g - mean).norm() <= (c + 1e-9) * mean.norm()
    # The problem is concave: at the best point no step inside the ball raises the least product.
    best = (J @ g).min()
    for seed in range(200):
        other = g + 10.0 ** -(seed % 5) * jacobian(1, seed=seed)[0] @ torch.linalg.pinv(J) @ J
        other = mean + (other - mean) * min(1.0, float(c * mean.norm() / (other - mean).norm()))
        assert (J @ other).min() <= best + 1e-7 * best.abs()


@pytest.mark.parametrize("K", SIZES)
def test_imtl_g_has_equal_projections(K):
    J = jacobian(K)
    w = weigh("imtl_g", J @ J.T)
    projections = (J @ (w @ J)) / J.norm(dim=1)
    assert abs(w.sum() - 1) < 1e-12
    assert relative_error(projections, projections[:1].expand(K)) < 1e-10


def test_imtl_g_of_lengths_a_million_apart():
    J = jacobian(3) * torch.tensor([[1e-6], [1.0], [1e6]], dtype=torch.float64)
    w = weigh("imtl_g", J @ J.T)
    projections = (J @ (w @ J)) / J.norm(dim=1)
    assert relative_error(projections, projections[:1].expand(3)) < 1e-6


@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl_has_equal_principal_directions(K, scale):
    J = jacobian(K)
    p = torch.arange(1.0, K + 1, dtype=torch.float64)
    U, S, V = torch.linalg.svd(J, full_matrices=False)
    size = {"min": S[-1], "median": S.flip(0)[(K - 1) // 2], "rmse": S.square().mean().sqrt()}[scale]
    found = weigh("aligned_mtl", J @ J.T, preference=p.tolist(), scale=scale) @ J
    assert relative_error(found, p @ (size * U @ V)) < 1e-10


@pytest.mark.parametrize("K", SIZES)
def test_nash_mtl_solves_the_bargain(K):
    J = jacobian(K)
    G = J @ J.T
    free = weigh("nash_mtl", G, max_norm=0.0)
    assert (free > 0).all()
    assert relative_error(G @ free / G.norm(), 1 / free) < 1e-8
    clipped = weigh("nash_mtl", G)
    assert abs((clipped @ J).norm() - 1) < 1e-12
    assert relative_error(clipped / clipped.sum(), free / free.sum()) < 1e-12


@pytest.mark.parametrize("K", [*SIZES, 12])
@pytest.mark.parametrize("make", [jacobian, dependent])
def test_dual_cone(K, make):
    J = make(K)
    G = J @ J.T
    each = torch.eye(K, dtype=torch.float64) / K
    found = weigh("upgrad", G, reg_eps=0.0) @ J
    assert (found - sum(cone(J, u @ J) for u in each)).norm() < 1e-6 * J.norm()
    p = torch.arange(1.0, K + 1, dtype=torch.float64)
    found = weigh("dualproj", G, reg_eps=0.0, preference=p.tolist()) @ J
    assert (found - cone(J, p @ J)).norm() < 1e-6 * J.norm()


def cone(J: Tensor, x: Tensor) -> Tensor:
    """Nearest point with no negative product with a row, by Moreau: `x` plus a non-negative combination of rows."""
    from scipy.optimize import nnls

    return x + torch.from_numpy(J.T.numpy() @ nnls(J.T.numpy(), -x.numpy(), maxiter=10_000)[0])


@pytest.mark.parametrize("K", SIZES)
def test_config_has_equal_cosines_and_the_sum_of_projections(K):
    J = jacobian(K)
    g = weigh("config", J @ J.T) @ J
    cosines = J @ g / J.norm(dim=1) / g.norm()
    assert relative_error(cosines, cosines[:1].expand(K)) < 1e-10
    assert abs(g.norm() - (J @ g).sum() / g.norm()) < 1e-10
    p = torch.arange(1.0, K + 1, dtype=torch.float64)
    g = weigh("config", J @ J.T, preference=p.tolist()) @ J
    cosines = J @ g / J.norm(dim=1) / g.norm()
    assert relative_error(cosines / cosines[0], p) < 1e-10


def test_plain_rules():
    G = torch.eye(3)
    assert weigh("sum", G).tolist() == [1, 1, 1]
    assert weigh("mean", G).tolist() == [1 / 3] * 3
    assert surgery.weights(G, "constant", values=[1, -2, 0.5]).tolist() == [1, -2, 0.5]


@pytest.mark.parametrize("name", ["mgda", "cagrad", "upgrad", "dualproj"])
def test_the_host_solver_agrees_with_the_enumeration(name, monkeypatch):
    problems = [jacobian(K, seed=K) for K in (1, 2, 4, 7)] + [dependent(4)]
    exact = [weigh(name, J @ J.T) @ J for J in problems]
    monkeypatch.setattr(rules.supports, "MOST", 0)
    for J, g in zip(problems, exact, strict=True):
        assert relative_error(weigh(name, J @ J.T) @ J, g) < 1e-5
    J = problems[2]
    many = weigh(name, torch.stack([J @ J.T, 2 * J @ J.T]))
    assert relative_error(many[0] @ J, exact[2]) < 1e-5

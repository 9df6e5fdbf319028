"""Every rule against its definition on vectors, and at the edges."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.surgery.gramians import awkward, dependent, jacobian
from tests.surgery.lists import gradients
from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules
from unlearn_kernels.testing import relative_error

PAIRS = ["agem", "gru", "blur", "ngdiff", "munba"]
MANY = [
    "pcgrad",
    "gradvac",
    "mgda",
    "cagrad",
    "imtl_g",
    "aligned_mtl",
    "nash_mtl",
    "upgrad",
    "dualproj",
    "config",
]
PLAIN = ["mean", "sum", "constant"]
SIZES = range(1, 9)


def options(name: str, sets: int) -> dict[str, object]:
    return {"values": [0.5 + k for k in range(sets)]} if name == "constant" else {}


def weigh(name: str, G: Tensor, **more: object) -> Tensor:
    return surgery.weights(G, name, **options(name, G.shape[-1]), **more)


def sizes(name: str) -> list[int]:
    return [2] if name in PAIRS else list(SIZES)


CASES = [(name, K) for name in rules.RULES for K in sizes(name)]


def test_all_rules_are_here():
    assert sorted(rules.RULES) == sorted([*PAIRS, *MANY, *PLAIN])


# Definitions, on vectors.


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


# Edges.


@pytest.mark.parametrize(("name", "K"), CASES)
def test_awkward_gramians_have_finite_weights_that_do_not_explode(name, K):
    for case, J in awkward(K).items():
        G = J @ J.T
        w = weigh(name, G)
        assert w.shape == (K,), case
        assert w.dtype == torch.float64, case
        assert w.isfinite().all(), case
        bound = 100 * K * G.diagonal().max().sqrt().clamp(min=1)
        assert (w @ J).norm() <= bound, case


@pytest.mark.parametrize(("name", "K"), CASES)
def test_not_finite_in_is_nan_out(name, K):
    J = jacobian(K)
    clean = weigh(name, J @ J.T)
    for value in (torch.nan, torch.inf, -torch.inf):
        G = J @ J.T
        G[K - 1, 0] = G[0, K - 1] = value
        found = weigh(name, torch.stack([G, J @ J.T]))
        assert found[0].isnan().all()
        assert relative_error(found[1], clean) < 1e-12


@pytest.mark.parametrize(("name", "K"), CASES)
@pytest.mark.parametrize("factor", [1e-20, 1e20])
def test_the_scale_does_not_matter(name, K, factor):
    J = jacobian(K)
    unclipped = {"max_norm": 0.0} if name == "nash_mtl" else {}
    unscaled = weigh(name, J @ J.T, **unclipped)
    scaled = weigh(name, factor * (J @ J.T), **unclipped)
    if name in ("ngdiff", "munba"):
        scaled = scaled * math.sqrt(factor)
    assert relative_error(scaled, unscaled) < 1e-9


@pytest.mark.parametrize(("name", "K"), CASES)
def test_leading_dimensions_are_independent(name, K):
    some = [J for J in awkward(K).values()] + [jacobian(K, seed=s) for s in range(2)]
    G = torch.stack([J @ J.T for J in some[:8]]).reshape(2, 4, K, K)
    found = weigh(name, G)
    for index in [(0, 0), (0, 3), (1, 1), (1, 3)]:
        single = weigh(name, G[index])
        assert (found[index] - single).norm() <= 1e-9 * single.norm() + 1e-15


@pytest.mark.parametrize(("name", "K"), CASES)
def test_bfloat16_gradients(name, K):
    sets = gradients(K, torch.bfloat16)
    G = surgery.gramian(sets)
    J = torch.stack([torch.cat([x.double().flatten() for x in g]) for g in sets])
    assert relative_error(weigh(name, G) @ J, weigh(name, J @ J.T) @ J) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dependent_gradients_of_20_million_elements(dtype):
    g = [torch.empty(20_000_000, dtype=dtype) for _ in range(3)]
    for k, x in enumerate(g):
        x.uniform_(-1, 1, generator=torch.Generator().manual_seed(k))
    g[1].sub_(g[0], alpha=0.5)
    g[2] = (-0.5 * g[0].float() - 0.25 * g[1].float()).to(dtype)
    G = surgery.gramian([[x] for x in g])
    for name in MANY:
        w = weigh(name, G)
        assert w.isfinite().all(), name
        assert w.abs().max() < 1e3, name


class Watch(TorchDispatchMode):
    """Refuses copies to another device that the host would wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            assert kwargs.get("non_blocking"), kwargs
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("name", "K"), [(n, K) for n, K in CASES if K in (1, 2, 4) and not rules.RULES[n].waits]
)
def test_no_host_waits_for_a_gramian_elsewhere(name, K):
    more = {"generator": torch.Generator().manual_seed(0)} if name in ("pcgrad", "gradvac") else {}
    more |= {"iterations": 3} if name == "mgda" and K == 4 else {}
    more |= {"preference": [1.0] * K} if name in ("upgrad", "dualproj") else {}
    with Watch():  # tensors without values: whatever looks at one raises
        found = weigh(name, torch.empty(3, K, K, device="meta"), **more)
    assert found.device.type == "meta"
    assert found.shape == (3, K)


# Objects.


def test_rules_with_a_memory_go_on_where_they_were():
    grams = [(J @ J.T) for J in (jacobian(4, seed=s) for s in range(4))]
    for make in (rules.PCGrad, rules.GradVac):
        one = make(torch.Generator().manual_seed(1))
        for G in grams[:2]:
            one(G)
        other = make(torch.Generator().manual_seed(9))
        other.load_state_dict(one.state_dict())
        for G in grams[2:]:
            assert torch.equal(one(G), other(G))
    one.reset()
    assert one.targets is None
    assert rules.MGDA().state_dict() == {}
    with pytest.raises(ValueError, match=r"state of gradvac must have the keys \['targets'\], got \['x'\]"):
        rules.GradVac().load_state_dict({"x": 1})


def test_a_step_that_is_not_finite_leaves_targets_alone():
    rule = rules.GradVac()
    J = jacobian(3)
    rule(J @ J.T)
    before = rule.targets.clone()
    assert rule(torch.full((3, 3), torch.nan)).isnan().all()
    assert torch.equal(rule.targets, before)


def test_a_published_frank_wolfe_is_near_the_exact_solution():
    J = jacobian(3)
    exact = weigh("mgda", J @ J.T)
    assert relative_error(weigh("mgda", J @ J.T, iterations=5000, epsilon=0.0), exact) < 1e-2
    assert not torch.equal(weigh("mgda", J @ J.T, iterations=1), exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.eye(2), "pc"), "rule must be 'agem' or .* got 'pc'"),
        ((torch.eye(3), "agem"), r"gramian must be 2 x 2 for the rule 'agem', got shape \(3, 3\)"),
        ((torch.ones(2, 3), "sum"), r"gramian must have shape \(\.\.\., K, K\), got \(2, 3\)"),
        ((torch.ones(0, 0), "sum"), r"gramian must have shape \(\.\.\., K, K\), got \(0, 0\)"),
        ((torch.eye(2).int(), "sum"), "gramian must be of a floating-point dtype, got torch.int32"),
    ],
)
def test_refused_gramians(arguments, message):
    with pytest.raises(ValueError, match=message):
        surgery.weights(*arguments)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("gru", {"cosine_clip": -0.5}, "cosine_clip must be at least 0, got -0.5"),
        ("gradvac", {"beta": 2}, "beta must be between 0 and 1, got 2"),
        ("cagrad", {"c": -1}, "c must be at least 0, got -1"),
        ("mgda", {"iterations": 0}, "iterations must be at least 1, got 0"),
        ("nash_mtl", {"max_norm": -1}, "max_norm must be at least 0, got -1"),
        ("upgrad", {"reg_eps": -1}, "reg_eps must be at least 0, got -1"),
        ("aligned_mtl", {"scale": "max"}, "scale must be 'min' or 'median' or 'rmse', got 'max'"),
        ("config", {"preference": [1.0]}, r"preference must have one entry a set, 2, got shape \(1,\)"),
        ("constant", {"values": [1.0]}, r"values must have one entry a set, 2, got shape \(1,\)"),
    ],
)
def test_refused_options(name, given, message):
    with pytest.raises(ValueError, match=message):
        surgery.weights(torch.eye(2), name, **given)


def test_options_belong_to_a_name():
    with pytest.raises(ValueError, match=r"options must be given when the rule is made, got \['c'\]"):
        surgery.weights(torch.eye(2), rules.CAGrad(), c=1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        surgery.weights(torch.eye(2), "agem", c=1.0)

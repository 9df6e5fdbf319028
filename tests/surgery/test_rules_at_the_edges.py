"""Gramians that are awkward, not finite, tiny, stacked or elsewhere; what is refused; rules with a memory."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.surgery.gramians import awkward, jacobian
from tests.surgery.lists import gradients
from tests.surgery.weighing import CASES, MANY, weigh
from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules
from unlearn_kernels.testing import relative_error


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

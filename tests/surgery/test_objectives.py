"""`GradientSurgery`, the object of a training loop, against the formulas on flat float64 vectors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.two_losses import (
    RULES,
    X,
    collect,
    flat,
    flat_gradient,
    forget_loss,
    net,
    retain_loss,
)
from unlearn_kernels import surgery
from unlearn_kernels.surgery import GradientSurgery, rules
from unlearn_kernels.testing import randn, relative_error


@pytest.mark.parametrize("rule", RULES)
def test_a_step_is_the_weighted_sum(rule):
    model, plain = net(), net()
    f, r = flat_gradient(plain, forget_loss(plain, X[0])), flat_gradient(plain, retain_loss(plain, X[1]))
    if rule in ("agem", "gru"):  # what does not forget takes no part
        r = torch.where(torch.arange(len(r)) < len(r) - 18, r, 0.0)
    J = torch.stack([f, r])
    w = surgery.weights(J @ J.T, rule, **RULES[rule])
    surg = GradientSurgery(model, rule, **RULES[rule])
    collect(surg, model, X[0], X[1])
    before = flat(model)
    found = surg.step(torch.optim.SGD(model.parameters(), lr=0.1))
    assert relative_error(before - flat(model), 0.1 * w @ J) < 1e-9
    assert relative_error(found.gramian, J @ J.T) < 1e-12
    assert relative_error(found.weights, w) < 1e-9
    assert relative_error(found.norms, J.norm(dim=1)) < 1e-12
    assert abs(found.cosines[0, 1] - torch.cosine_similarity(f, r, 0)) < 1e-12
    assert abs(found.norm - (w @ J).norm()) < 1e-9 * found.norm
    assert found.finite
    assert found.conflict_rate[0, 1] == float(f @ r < 0)
    assert all(p.grad is None for p in model.parameters())


def test_three_objectives_by_another_name():
    model = net()
    losses = forget_loss(model, X[0]), retain_loss(model, X[1]), retain_loss(model, X[2])
    gs = [flat_gradient(model, loss) for loss in losses]
    J = torch.stack(gs)
    surg = GradientSurgery(model.parameters(), rules.MGDA(), objectives=("style", "prior", "text"))
    # The order of the calls is free.
    with surg.objective("text"):
        retain_loss(model, X[2]).backward()
    with surg.objective("style"):
        forget_loss(model, X[0]).backward()
    with surg.objective("prior"):
        retain_loss(model, X[1]).backward()
    found = surg.apply()
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert relative_error(got, surgery.weights(J @ J.T, "mgda") @ J) < 1e-9
    assert found.objectives == ("style", "prior", "text")


def test_several_backward_calls_add_up_in_any_order():
    model, plain = net(), net()
    f = sum(flat_gradient(plain, forget_loss(plain, X[i])) for i in (0, 1, 2))
    r = sum(flat_gradient(plain, retain_loss(plain, X[i])) for i in (3, 4))
    J = torch.stack([f, r])
    surg = GradientSurgery(model, "pcgrad")
    for i in range(3):
        with surg.objective("forget"):
            forget_loss(model, X[i]).backward()
        with surg.objective("retain"):
            if i < 2:
                retain_loss(model, X[3 + i]).backward()
    before = flat(model)
    surg.step(torch.optim.SGD(model.parameters(), lr=1.0))
    assert relative_error(before - flat(model), surgery.weights(J @ J.T, "pcgrad") @ J) < 1e-12


@pytest.mark.parametrize("rule", ["agem", "pcgrad"])
def test_gradients_are_never_copied(rule):
    model = net()
    surg = GradientSurgery(model, rule)
    with surg.objective("forget"):
        forget_loss(model, X[0]).backward()
        addresses = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert all(p.grad is None for p in model.parameters())
    with surg.objective("retain"):
        retain_loss(model, X[1]).backward()
    with surg.objective("forget"):
        assert [p.grad.data_ptr() for p in model.parameters() if p.grad is not None] == addresses
    surg.apply()
    written = [p.grad.data_ptr() for p in model.parameters() if p.grad is not None]
    assert written[: len(addresses)] == addresses


def test_graphs_are_freed_at_each_backward():
    model = net()
    surg = GradientSurgery(model, "pcgrad")
    with surg.objective("forget"):
        loss = forget_loss(model, X[0])
        loss.backward()
    with surg.objective("retain"), pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("rule", ["agem", "gru", "mgda", "upgrad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_and_mixed_parameters(rule, dtype):
    model = net(dtype)
    model.head.float()
    surg = GradientSurgery(model, rule)
    sets: dict[str, list[Tensor | None]] = {}
    for k, name in enumerate(("forget", "retain")):
        with surg.objective(name):
            for i, p in enumerate(surg.parameters):
                p.grad = (randn(*p.shape, seed=10 * k + i) - 0.5 * k).to(p.dtype)
            sets[name] = [p.grad.clone() for p in surg.parameters]
    G = surgery.gramian(list(sets.values()))
    expected = surgery.combine(list(sets.values()), surgery.weights(G, rule))
    surg.apply()
    for p, x in zip(surg.parameters, expected, strict=True):
        assert torch.equal(p.grad, x)
        assert p.grad.dtype == p.dtype


def test_autocast_and_a_scaler_step_as_without():
    with torch.autocast("cpu", torch.bfloat16):
        model, plain = net(torch.float32), net(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        steps = []
        for m, s in ((plain, None), (model, scaler)):
            surg = GradientSurgery(m, "munba")  # whose weights depend on the scale
            collect(surg, m, X[0].float(), X[1].float(), s)
            steps.append(surg.step(torch.optim.SGD(m.parameters(), lr=0.1), s))
    scaler.update()
    assert relative_error(steps[1].gramian, steps[0].gramian) < 1e-5
    assert relative_error(steps[1].weights, steps[0].weights) < 1e-5
    assert relative_error(flat(model), flat(plain)) < 1e-6


def test_parameter_groups_are_taken_as_an_optimizer_has_them():
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model.body.parameters()}, {"params": model.head.parameters()}], lr=0.1
    )
    surg = GradientSurgery(optimizer.param_groups, "pcgrad")
    assert [id(p) for p in surg.parameters] == [id(p) for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("rule", ["pcgrad", "agem", "nash_mtl", "doco", "gdr_gma"])
def test_the_norm_is_limited_before_the_gradient_is_formed(rule):
    model = net()
    surg = GradientSurgery(model, rule, max_norm=0.01)
    collect(surg, model, X[0], X[1])
    found = surg.apply()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert abs(torch.cat([g.flatten() for g in gradients]).norm() - found.norm) < 1e-12
    surg.zero_grad()
    plain = GradientSurgery(model, rule)
    collect(plain, model, X[0], X[1])
    plain.apply()
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(relative_error(g, e) < 1e-9 for g, e in zip(gradients, expected, strict=True))
    plain.zero_grad()
    wide = GradientSurgery(model, rule, max_norm=1e6)
    collect(wide, model, X[0], X[1])
    assert wide.apply().norm > 0.01


def test_who_steps_alone_finds_the_gradient_in_place():
    model = net()
    surg = GradientSurgery(model, "pcgrad")
    collect(surg, model, X[0], X[1])
    surg.apply()
    with pytest.raises(
        ValueError, match=r"\.grad must be None outside of objectives, got gradients for 5 parameters"
    ):
        surg.apply()
    surg.zero_grad()
    with pytest.raises(ValueError, match=r"objective 'forget' has no gradient"):
        surg.apply()


def test_gradients_outside_of_objectives_are_put_back():
    model = net()
    surg = GradientSurgery(model, "pcgrad")
    retain_loss(model, X[0]).backward()
    outside = [p.grad for p in model.parameters()]
    with surg.objective("forget"):
        assert all(p.grad is None for p in model.parameters())
        forget_loss(model, X[0]).backward()
    assert all(a is p.grad for a, p in zip(outside, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="nested"), surg.objective("forget"):
        raise RuntimeError("nested")
    assert all(a is p.grad for a, p in zip(outside, model.parameters(), strict=True))


@pytest.mark.parametrize("scope", ["tensor", "group", "row"])
@pytest.mark.parametrize("rule", ["pcgrad", "mgda", "agem"])
def test_each_segment_has_its_own_weights(scope, rule):
    model = net()
    optimizer = torch.optim.SGD(
        [{"params": model.body.parameters()}, {"params": model.head.parameters()}], lr=0.1
    )
    surg = GradientSurgery(optimizer.param_groups, rule, scope=scope)
    collect(surg, model, X[0], X[1])
    held = [[x.clone() for x in surg._held[name]] for name in surg.objectives]
    groups = [0, 0, 1, 1] if scope == "group" else None
    G = surgery.gramian(held, scope=scope, groups=groups)
    w = surgery.weights(G, rule)
    expected = surgery.combine(held, w, scope=scope, groups=groups)
    found = surg.apply()
    assert found.gramian.shape == G.shape == ({"tensor": 4, "group": 2, "row": 14}[scope], 2, 2)
    assert relative_error(found.weights, w) < 1e-12
    for p, x in zip(surg.parameters, expected, strict=True):
        assert relative_error(p.grad, x) < 1e-12
    assert relative_error(found.norm, torch.cat([x.flatten() for x in expected]).norm()) < 1e-9
    assert relative_error(found.conflict_rate[0, 1], (G[:, 0, 1] < 0).double().mean()) == 0


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("doco", {"lam": 0.5}),
        ("gdr_gma", {"compat": True}),
        ("sago", {"gamma": 2.0}),
        ("graddrop", {"seed": 3}),
    ],
)
def test_rules_that_only_the_projection_knows(rule, options):
    model = net()
    surg = GradientSurgery(model, rule, **options)
    collect(surg, model, X[0], X[1])
    forget, retain = ([None if x is None else x.clone() for x in surg._held[n]] for n in surg.objectives)
    conflict = surgery.project_conflict_(forget, retain, rule=rule, **options)
    found = surg.apply()
    assert torch.equal(found.gramian, conflict.gramian)
    assert (found.rates is not None) == (rule in ("sago", "graddrop"))
    assert found.finite
    for p, x in zip(surg.parameters, forget, strict=True):
        assert (p.grad is None and x is None) or torch.equal(p.grad, x)
    surg.zero_grad()
    collect(surg, model, X[0], X[1])
    with surg.objective("retain"):
        model.head.bias.grad[0] = torch.nan
    before = flat(model)
    assert not surg.step(torch.optim.SGD(model.parameters(), lr=0.1)).finite
    assert torch.equal(flat(model), before)
    scaler = torch.amp.GradScaler("cpu")
    collect(surg, model, X[0], X[1], scaler)
    with pytest.raises(ValueError, match=f"rule '{rule}' works on whole, unscaled gradients"):
        surg.apply(scaler)


MISUSES: list[tuple[Callable[[], object], str]] = [
    (lambda: GradientSurgery([], "sum"), "parameters must hold at least one that requires a gradient"),
    (lambda: GradientSurgery(net(), "pc"), "rule must be .* got 'pc'"),
    (lambda: GradientSurgery(net(), "agem", objectives="abc"), "objectives must be 2 for the rule 'agem'"),
    (lambda: GradientSurgery(net(), "sum", objectives=("a", "a")), "objectives must be distinct names"),
    (lambda: GradientSurgery(net(), scope="layer"), "scope must be 'global' or .* got 'layer'"),
    (lambda: GradientSurgery(net(), "sago", scope="row"), "scope must be 'element', got 'row'"),
    (lambda: GradientSurgery(net(), "doco", gamma=1.0), "gamma is no option of rule 'doco'"),
    (
        lambda: GradientSurgery(net(), ema={"r": 0.5}),
        r"ema must name objectives of \('forget', 'retain'\), got 'r'",
    ),
    (
        lambda: GradientSurgery(net(), ema={"retain": 0}),
        r"ema\['retain'\] must be above 0 and at most 1, got 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), MISUSES)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_objectives_do_not_nest():
    surg = GradientSurgery(net())
    message = "objective 'retain' was entered inside 'forget'"
    with pytest.raises(RuntimeError, match=message), surg.objective("forget"), surg.objective("retain"):
        pass
    with pytest.raises(ValueError, match="name must be 'forget' or 'retain', got 'x'"), surg.objective("x"):
        pass
    with pytest.raises(ValueError, match=r"averages must be of \[\], got \['retain'\] too"):
        surg.load_state_dict({"rule": {}, "averages": {"retain": []}})

"""`GradientSurgery` over several steps: those that are skipped, moving averages, state saved and restored."""

import pytest
import torch
from torch import nn

from tests.surgery.two_losses import X, collect, flat, flat_gradient, forget_loss, net, retain_loss
from unlearn_kernels import surgery
from unlearn_kernels.surgery import GradientSurgery
from unlearn_kernels.testing import relative_error


@pytest.mark.parametrize("rule", ["agem", "pcgrad", "ngdiff"])
@pytest.mark.parametrize("bad", ["forget", "retain"])
@pytest.mark.parametrize("scaled", [True, False])
def test_a_step_that_is_not_finite_is_skipped(rule, bad, scaled):
    model = net(torch.float32)
    before = flat(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    surg = GradientSurgery(model, rule)
    for value in (torch.inf, torch.nan):
        collect(surg, model, X[0].float(), X[1].float(), scaler)
        with surg.objective(bad):
            model.head.weight.grad[0, 0] = value
        found = surg.step(optimizer, scaler)
        assert not found.finite
        assert torch.equal(flat(model), before)
        if scaler:
            scaler.update()
    if scaler:
        assert scaler.get_scale() == 2.0
    collect(surg, model, X[0].float(), X[1].float(), scaler)
    assert surg.step(optimizer, scaler).finite
    assert flat(model).isfinite().all()
    assert not torch.equal(flat(model), before)


def test_an_optimizer_may_be_told_on_the_device():
    from unlearn_kernels.surgery._step import step_if

    model = net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = flat(model)
    for finite in (False, True):
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        step_if(optimizer, torch.tensor(finite))
        assert torch.equal(flat(model), before) != finite
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("scale", [1.0, 64.0])
def test_gru_keeps_a_moving_average_of_retain_gradients(scale):
    model, plain = net(), net()
    m, average = 0.25, None
    surg = GradientSurgery(model, "gru", ema={"retain": m}, cosine_clip=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale * 2**step) if scale != 1 else None
        f = flat_gradient(plain, forget_loss(plain, X[step]))
        r = flat_gradient(plain, retain_loss(plain, X[step + 1]))
        r[-18:] = 0  # no forget gradient there
        average = r if average is None else (1 - m) * average + m * r
        J = torch.stack([f, average])
        g = surgery.weights(J @ J.T, "gru", cosine_clip=0.5) @ J
        with torch.no_grad():
            start = 0
            for p in (p for p in plain.parameters() if p.requires_grad):
                p -= 0.1 * g[start : start + p.numel()].view_as(p)
                start += p.numel()
        collect(surg, model, X[step], X[step + 1], scaler)
        surg.step(optimizer, scaler)
        assert relative_error(flat(model), flat(plain)) < 1e-9


def test_an_average_stays_out_of_a_step_that_is_not_finite_and_of_one_without_it():
    model = net()
    surg = GradientSurgery(model, "gru", ema={"retain": 0.5})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    collect(surg, model, X[0], X[1])
    surg.step(optimizer)
    before = [None if x is None else x.clone() for x in surg.averages.values["retain"]]
    collect(surg, model, X[0], X[2])
    with surg.objective("retain"):
        model.head.bias.grad[0] = torch.nan
    assert not surg.step(optimizer).finite
    with surg.objective("forget"):
        forget_loss(model, X[0]).backward()
    assert surg.step(optimizer).gramian[1, 1] > 0
    for x, y in zip(surg.averages.values["retain"], before, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)


def test_an_average_begins_at_zero_where_a_gradient_comes_late():
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    surg = GradientSurgery([p, q], "sum", ema={"retain": 0.25})
    for late in (False, True):
        with surg.objective("forget"):
            p.grad = torch.ones(3)
        with surg.objective("retain"):
            p.grad = torch.full((3,), 2.0)
            q.grad = torch.full((2,), 4.0) if late else None
        surg.apply()
        written = p.grad, q.grad
        surg.zero_grad()
    assert written[0].tolist() == [3.0] * 3
    assert written[1].tolist() == [1.0] * 2
    assert [x.tolist() for x in surg.averages.values["retain"]] == [[2.0] * 3, [1.0] * 2]


@pytest.mark.parametrize("rule", ["pcgrad", "gradvac", "gru"])
def test_state_is_saved_and_restored(rule, tmp_path):
    def make(m: nn.Module) -> GradientSurgery:
        more = {"ema": {"retain": 0.5}} if rule == "gru" else {"generator": torch.Generator().manual_seed(3)}
        return GradientSurgery(m, rule, **more)

    def run(m: nn.Module, surg: GradientSurgery, steps: range) -> None:
        for i in steps:
            collect(surg, m, X[i], X[i + 1])
            surg.step(torch.optim.SGD(m.parameters(), lr=0.1))

    whole, halves = net(), net()
    one = make(whole)
    run(whole, one, range(4))
    first = make(halves)
    run(halves, first, range(2))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = make(halves)
    second.load_state_dict(torch.load(tmp_path / "state.pt"))
    run(halves, second, range(2, 4))
    assert torch.equal(flat(whole), flat(halves))

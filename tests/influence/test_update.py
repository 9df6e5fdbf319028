"""Unlearning steps, audited on a convex model against training without what was forgotten."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels.influence import (
    EKFAC,
    cg,
    datainf_damping,
    datainf_inverse,
    diagonal,
    ekfac_inverse,
    fisher,
    forget_gradient,
    influence_update_,
    newton,
    squared_norms,
    squared_rows,
)
from unlearn_kernels.testing import randn, relative_error

DECAY = 0.05


class Logistic:
    """Softmax regression with weight decay on each sample, trained to the optimum by Newton's method."""

    def __init__(self, n: int = 240, d: int = 6, classes: int = 3) -> None:
        centres = randn(classes, d, dtype=torch.float64, seed=5)
        self.y = torch.arange(n) % classes
        self.x = centres[self.y] + 0.9 * randn(n, d, dtype=torch.float64, seed=6)
        self.classes = classes

    def loss(self, w: Tensor, rows: Tensor) -> Tensor:
        logits = self.x[rows] @ w.view(-1, self.classes)
        fit = torch.nn.functional.cross_entropy(logits, self.y[rows], reduction="sum")
        return fit + len(rows) * DECAY / 2 * w.square().sum()

    def gradient(self, w: Tensor, rows: Tensor) -> Tensor:
        return torch.func.grad(self.loss)(w, rows)

    def gradients(self, w: Tensor, rows: Tensor) -> Tensor:
        return torch.stack([self.gradient(w, i[None]) for i in rows])

    def hessian(self, w: Tensor, rows: Tensor) -> Tensor:
        return torch.func.hessian(self.loss)(w, rows)

    def trained(self, rows: Tensor) -> Tensor:
        w = torch.zeros(self.x.shape[1] * self.classes, dtype=torch.float64)
        for _ in range(20):
            w = w - torch.linalg.solve(self.hessian(w, rows), self.gradient(w, rows))
        assert self.gradient(w, rows).norm() < 1e-8
        return w


@pytest.fixture(scope="module")
def audit() -> tuple[Logistic, Tensor, Tensor, Tensor, Tensor, Tensor]:
    model = Logistic()
    forget, retain = torch.arange(12), torch.arange(12, 240)
    w = model.trained(torch.arange(240))
    return model, forget, retain, w, model.trained(retain), model.gradient(w, forget)


def error(w: Tensor, exact: Tensor, start: Tensor) -> float:
    """Distance from the retrained model, with doing nothing at 1."""
    return float((w - exact).norm() / (start - exact).norm())


def flawed(rows: Tensor, v: Tensor) -> Tensor:
    """The rank-1 recursion of the IU baseline."""
    o, k, n = rows[0].clone(), v.clone(), len(rows)
    for g in rows[1:]:
        k, o = k - (k @ g) / (n + o @ g) * o, o - (o @ g) / (n + o @ g) * o
    return k


def test_newton_step_comes_near_retraining(audit: tuple) -> None:
    model, _, retain, w, exact, v = audit
    moved = w.clone()
    update = influence_update_([moved], v, newton(model.hessian(w, retain)))
    assert update.residual < 1e-12
    assert error(moved, exact, w) < 0.05
    assert model.gradient(moved, retain).norm() < 0.05 * model.gradient(w, retain).norm()
    again = influence_update_([moved], -model.gradient(moved, retain), newton(model.hessian(moved, retain)))
    assert error(moved, exact, w) < 1e-3
    assert again.residual < 1e-12


def test_cg_takes_the_same_step(audit: tuple) -> None:
    model, _, retain, w, _, v = audit
    H = model.hessian(w, retain)
    a, b = w.clone(), w.clone()
    influence_update_([a], v, newton(H))
    influence_update_([b], v, lambda rhs: cg(lambda x: x @ H, rhs, tol=1e-12)[:2])
    assert relative_error(a, b) < 1e-10


def test_approximations_beat_doing_nothing_and_the_flawed_recursion(audit: tuple) -> None:
    """The Fisher matrix stands for the Hessian at an optimum: a good step, though not Newton's.

    DataInf's average of inverses is none at damping far below the gradients' norms, and its residual says so.
    """
    model, _, retain, w, exact, v = audit
    rows = model.gradients(w, retain) - DECAY * w
    n = len(retain)
    curvatures = {
        "fisher": fisher(rows, DECAY),
        "diagonal": diagonal(squared_rows(rows) / n, DECAY),
        "datainf": datainf_inverse([rows], torch.full((1,), DECAY, dtype=torch.float64)),
    }
    errors, residuals = {}, {}
    for name, inverse in curvatures.items():
        moved = w.clone()
        residuals[name] = influence_update_([moved], v / n, inverse).residual
        errors[name] = error(moved, exact, w)
    assert max(residuals["fisher"], residuals["diagonal"]) < 1e-10
    baseline = w + flawed(rows, v / n)
    assert errors["fisher"] < errors["diagonal"] < 1
    assert residuals["datainf"] > 1
    assert errors["datainf"] > 1
    assert errors["fisher"] < error(baseline, exact, w)


def test_ekfac_step(audit: tuple) -> None:
    """On one token a sample and one layer."""
    model, _, retain, w, exact, v = audit
    x, classes = model.x[retain], model.classes
    p = torch.softmax(x @ w.view(-1, classes), 1)
    signal = p - torch.nn.functional.one_hot(model.y[retain], classes)
    layer = EKFAC()
    layer.add_covariance(signal[:, None], x[:, None])
    layer.fit_basis()
    layer.add_lambda(signal[:, None], x[:, None])
    moved = w.clone()
    update = influence_update_([moved], v / len(retain), ekfac_inverse([layer], damping=DECAY))
    assert update.residual < 1e-10
    assert error(moved, exact, w) < 1


def fitted(bias: bool = False, scale: float = 1.0) -> EKFAC:
    layer = EKFAC(bias=bias)
    a, g = randn(9, 5, 4, dtype=torch.float64), scale * randn(9, 5, 3, dtype=torch.float64, seed=1)
    layer.add_covariance(a, g)
    layer.fit_basis()
    layer.add_lambda(a, g)
    return layer


def test_ekfac_step_of_layers_with_and_without_bias() -> None:
    """Parameters as a module has them, weight and then bias; `EKFAC` has the bias as the last column."""
    layers = [fitted(bias=True), fitted()]
    parameters = [torch.zeros(shape, dtype=torch.float64) for shape in ((3, 4), (3,), (3, 4))]
    v = randn(27, dtype=torch.float64, seed=2)
    update = influence_update_(parameters, v, ekfac_inverse(layers, damping=0.3))
    first = torch.cat([v[:12].view(3, 4), v[12:15, None]], 1)
    biased = layers[0].solve(first[None], damping=0.3).x[0]
    plain = layers[1].solve(v[15:].view(1, 3, 4), damping=0.3).x[0]
    for p, x in zip(parameters, (biased[:, :4], biased[:, 4], plain), strict=True):
        assert relative_error(p, x) < 1e-12
    assert update.residual < 1e-10


def test_ekfac_of_zero_and_of_other_sizes() -> None:
    inverse = ekfac_inverse([fitted(bias=True), fitted(scale=0.0)])
    x, residual = inverse(torch.zeros(2, 27))
    assert not x.any()
    assert not residual.any()
    alone = torch.cat([torch.zeros(1, 15), torch.ones(1, 12)], 1)
    x, residual = inverse(alone)
    assert not x.any()  # a layer without gradients does not move, and is not solved
    assert residual == 1
    with pytest.raises(ValueError, match=r"v must be \(Q, 27\), got \(1, 26\)"):
        inverse(alone[:, 1:])


def test_datainf_of_layers_without_gradients_stands_still() -> None:
    rows = [randn(4, 3), torch.zeros(4, 2)]
    damping = datainf_damping(rows, squared_norms(rows))
    x, residual = datainf_inverse(rows, damping)(torch.ones(1, 5))
    assert x[0, :3].all()
    assert not x[0, 3:].any()
    assert residual > 2**0.5 / 5**0.5
    x, residual = datainf_inverse(rows, damping)(torch.zeros(1, 5))
    assert residual == 0


@pytest.mark.parametrize(
    ("rows", "damping", "message"),
    [
        (randn(4, 3), -0.5, r"damping must be positive, got -0\.5 for layer 0"),
        (randn(4, 3), 0.0, r"damping must be positive, got 0\.0 for layer 0"),
        (randn(4, 3), torch.nan, "damping must be positive, got nan for layer 0"),
        (torch.zeros(0, 3), 1.0, r"rows must not be empty, got \(0, 3\)"),
        (torch.full((4, 3), torch.inf), 1.0, "norms must be finite, got inf in layer 0"),
    ],
)
def test_datainf_checks_rows_and_damping(rows: Tensor, damping: float, message: str) -> None:
    p = [torch.zeros(3)]
    with pytest.raises(ValueError, match=message):
        influence_update_(p, torch.ones(3), datainf_inverse([rows], torch.tensor([damping])))
    assert not p[0].any()


@pytest.mark.parametrize(
    ("parameter", "options", "message"),
    [
        (torch.zeros(3), {"scale": torch.nan}, "scale must be finite, got nan"),
        (torch.zeros(3), {"mask": torch.tensor([0, 5, 1])}, "mask must be 0 or 1, got 5"),
        (torch.zeros(3), {"mask": torch.tensor([0, torch.nan, 1])}, "mask must be 0 or 1, got nan"),
        (torch.zeros(3).half(), {"scale": 1e6}, r"must stay finite, number 1 does not in torch\.float16"),
        (torch.zeros(3).long(), {}, r"parameters must be floating-point, number 1 is torch\.int64"),
    ],
)
def test_what_cannot_be_applied_changes_nothing(parameter: Tensor, options: dict, message: str) -> None:
    p = [torch.zeros(0), parameter]
    with pytest.raises(ValueError, match=message):
        influence_update_(p, torch.ones(3), diagonal(torch.ones(3), 0.0), **options)
    assert not parameter.any()


def test_parameters_of_a_module() -> None:
    layer = torch.nn.Linear(2, 1)
    before = torch.cat([p.detach().flatten() for p in layer.parameters()])
    influence_update_(layer.parameters(), torch.ones(3), diagonal(torch.ones(3), 0.0))
    after = torch.cat([p.detach().flatten() for p in layer.parameters()])
    assert torch.equal(after, (before.double() + 1).float())


def test_tensors_mask_and_scale() -> None:
    weights = [randn(2, 3), randn(4, seed=1).bfloat16()]
    before = [p.clone() for p in weights]
    v, mask = randn(10, seed=2), torch.arange(10) % 2
    update = influence_update_(weights, v, diagonal(torch.ones(10), 1.0), scale=0.5, mask=mask)
    step = v.double() / 2 * mask
    assert relative_error(torch.cat([d.flatten() for d in update.delta]), step) < 1e-12
    assert torch.equal(weights[0], (before[0].double() + 0.5 * step[:6].view(2, 3)).float())
    assert torch.equal(weights[1], (before[1].double() + 0.5 * step[6:]).bfloat16())


def test_zero_is_warned_of_and_bad_steps_change_nothing() -> None:
    p = [randn(4)]
    with pytest.warns(RuntimeWarning, match="v is zero"):
        influence_update_(p, torch.zeros(4), diagonal(torch.ones(4), 0.0))
    for call, message in (
        (
            lambda: influence_update_(p, torch.ones(5), diagonal(torch.ones(5), 0.0)),
            r"v must have shape \(4,\)",
        ),
        (lambda: influence_update_(p, torch.ones(4), lambda v: (v / 0, v[:, 0])), "finite"),
        (lambda: newton(-torch.eye(3)), "pivot 0 is not"),
        (lambda: influence_update_(p, torch.ones(4), lambda v: (v, v[:, 0] / 0)), "got a residual of inf"),
        (lambda: influence_update_(p, torch.ones(4), newton(torch.eye(3))), r"v must be \(Q, 3\)"),
        (lambda: influence_update_(p, torch.ones(4), diagonal(torch.ones(1), 1.0)), r"v must be \(Q, 1\)"),
        (lambda: diagonal(torch.tensor([1.0, 0.0]), 0.0), r"add up to positive numbers, got 0\.0 at 1"),
        (lambda: diagonal(torch.ones(2, 2), 0.0), r"squares must be \(D,\), got \(2, 2\)"),
        (lambda: ekfac_inverse([]), "layers must not be empty"),
        (lambda: datainf_inverse([torch.ones(2, 3)], torch.ones(2)), r"got \(2,\)"),
        (lambda: forget_gradient(torch.ones(0, 3), torch.ones(2, 3)), "n > 0"),
    ):
        before = p[0].clone()
        with pytest.raises(ValueError, match=message):
            call()
        assert torch.equal(p[0], before)


def test_forget_gradient() -> None:
    forget, retain = randn(3, 5), randn(9, 5, seed=1)
    expected = (forget.double().mean(0) - retain.double().mean(0)) / 4
    assert relative_error(forget_gradient(forget, retain), expected) < 1e-6
    assert datainf_damping([forget], squared_norms([forget])).shape == (1,)
    halves = torch.full((4, 2), 6e4).half()
    assert torch.equal(forget_gradient(halves, -halves), torch.full((2,), halves[0, 0].float()))

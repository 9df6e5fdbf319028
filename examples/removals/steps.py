"""Unlearning steps, each judged by the model that was trained without the removed rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from unlearn_kernels.influence import (
    EKFAC,
    Update,
    Woodbury,
    datainf_damping,
    datainf_inverse,
    diagonal,
    ekfac_inverse,
    influence_update_,
    newton,
    squared_norms,
    squared_rows,
)

from .logistic import Logistic


class Removal:
    """Rows to remove from a model: what remains, the exact answer, and the gradient that drives every step."""

    def __init__(self, model: Logistic, forget: Tensor) -> None:
        self.model, self.forget = model, forget
        everything = torch.arange(len(model.x))
        self.retain = everything[~torch.isin(everything, forget)]
        self.exact = model.trained(self.retain)
        self.rows = model.gradients(model.w, self.retain)
        # At the optimum the removed rows' gradient is what the others and the penalty do not balance.
        self.v = model.gradients(model.w, forget).sum(0)

    @property
    def n(self) -> int:
        """Rows that stay."""
        return len(self.retain)

    def fisher(self, labels: Tensor | None) -> Woodbury:
        """The Fisher matrix of all rows, factored, and then without the removed ones."""
        rows = self.model.gradients(self.model.w, torch.arange(len(self.model.x)), labels)
        found = Woodbury(rows, self.model.decay / len(rows))
        found.remove(self.forget)
        return found


Step = Callable[[Removal, Tensor], Update]


def _nothing(removal: Removal, w: Tensor) -> Update:
    return Update([torch.zeros_like(w)], 1.0)


def _newton(removal: Removal, w: Tensor) -> Update:
    return influence_update_([w], removal.v, newton(removal.model.hessian(w, removal.retain)))


def _classical(removal: Removal, w: Tensor) -> Update:
    """Koh and Liang's influence function: the Hessian of all rows."""
    return influence_update_(
        [w], removal.v, newton(removal.model.hessian(w, torch.arange(len(removal.model.x))))
    )


def _empirical(removal: Removal, w: Tensor) -> Update:
    return influence_update_([w], removal.v / len(removal.model.x), removal.fisher(None).solve)


def _fisher(removal: Removal, w: Tensor) -> Update:
    inverse = removal.fisher(removal.model.sampled()).solve
    return influence_update_([w], removal.v / len(removal.model.x), inverse)


def _diagonal(removal: Removal, w: Tensor) -> Update:
    rows = removal.model.gradients(w, removal.retain, removal.model.sampled())
    squares = squared_rows(rows) / removal.n
    return influence_update_([w], removal.v / removal.n, diagonal(squares, removal.model.decay / removal.n))


def _ekfac(removal: Removal, w: Tensor) -> Update:
    layer, model = EKFAC(), removal.model
    a, g = model.x[removal.retain][:, None], model.signal(w, removal.retain, model.sampled())[:, None]
    layer.add_covariance(a, g)
    layer.fit_basis()
    layer.add_lambda(a, g)
    inverse = ekfac_inverse([layer], damping=model.decay / removal.n)
    return influence_update_([w], removal.v / removal.n, inverse)


def _datainf(removal: Removal, w: Tensor) -> Update:
    damping = datainf_damping([removal.rows], squared_norms([removal.rows]))
    return influence_update_([w], removal.v / removal.n, datainf_inverse([removal.rows], damping))


def _copied(removal: Removal, w: Tensor) -> Update:
    """IU's "WoodFisher" as it is copied from one repository to the next: v and a multiple of one gradient."""
    v, n = removal.v / removal.n, 1000
    o, k = removal.rows[0].clone(), v.clone()
    for g in removal.rows[1 : n + 2]:
        k, o = k - (k @ g) / (n + o @ g) * o, o - (o @ g) / (n + o @ g) * o
    w += k.view_as(w)
    return Update([k.view_as(w)], float("nan"))


STEPS: dict[str, Step] = {
    "nothing": _nothing,
    "newton": _newton,
    "influence function": _classical,
    "fisher": _fisher,
    "empirical fisher": _empirical,
    "ekfac": _ekfac,
    "diagonal fisher": _diagonal,
    "datainf": _datainf,
    "woodfisher as copied": _copied,
}


def audit(removal: Removal, step: str) -> dict[str, float]:
    """What a step leaves: distances from the exact answer with doing nothing at 1, and losses beside the exact ones."""
    model, start = removal.model, removal.model.w
    moved = start.clone()
    update = STEPS[step](removal, moved)
    goal, taken = (removal.exact - start).flatten(), update.delta[0].flatten()
    length = float(taken @ goal / taken.square().sum()) if bool(taken.any()) else 0.0
    p, wanted = (model.probabilities(w, model.test_x) for w in (moved, removal.exact))
    gone = model.x[removal.forget], model.y[removal.forget]
    return {
        "error": float((moved - removal.exact).norm() / goal.norm()),
        "best_length_error": float((length * taken - goal).norm() / goal.norm()),
        "gradient_left": float(
            model.gradient(moved, removal.retain).norm() / model.gradient(start, removal.retain).norm()
        ),
        "residual": update.residual,
        "test_deviation": float((p - wanted).abs().max()),
        "forget_loss": model.loss(moved, *gone),
        "forget_loss_retrained": model.loss(removal.exact, *gone),
        "accuracy": model.accuracy(moved),
        "accuracy_retrained": model.accuracy(removal.exact),
    }

"""L2 logistic regression, trained to the optimum by scikit-learn, with gradients and Hessians of any of its rows."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

Split = tuple[Tensor, Tensor, Tensor, Tensor]


def load(name: str, seed: int) -> Split:
    """Train and test rows, scaled by the train rows and with a last column of ones, and their labels."""
    from sklearn import datasets

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(x))
    train, test = order[len(x) // 5 :], order[: len(x) // 5]
    mean, spread = x[train].mean(0), x[train].std(0)
    x = np.c_[(x - mean) / np.where(spread > 0, spread, 1), np.ones(len(x))]
    both = torch.from_numpy(x).double(), torch.from_numpy(y).long()
    return both[0][train], both[1][train], both[0][test], both[1][test]


class Logistic:
    r"""`\sum_i \ell_i(w) + \lambda / 2 |w|^2`: softmax regression, or one output for two classes.

    The column of ones is penalised like the others, so that the optimum is unique.

    Attributes:
        w: the optimum on all train rows, (outputs, d).
    """

    def __init__(self, x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor, decay: float) -> None:
        self.x, self.y, self.test_x, self.test_y, self.decay = x, y, test_x, test_y, decay
        self.classes = int(y.max()) + 1
        self.w = self.trained(torch.arange(len(x)))

    def trained(self, rows: Tensor) -> Tensor:
        """The optimum on some rows, by scikit-learn."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(
            C=1 / self.decay, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=200
        )
        model.fit(self.x[rows].numpy(), self.y[rows].numpy())
        return torch.from_numpy(model.coef_.copy())

    def probabilities(self, w: Tensor, x: Tensor) -> Tensor:
        """(n, classes), or (n, 1) of the second of two."""
        logits = x @ w.T
        return logits.sigmoid() if self.classes == 2 else logits.softmax(1)

    def sampled(self) -> Tensor:
        """A label for each row, drawn from the model: with them the Fisher matrix is the Hessian in the mean."""
        generator = torch.Generator().manual_seed(0)
        p = self.probabilities(self.w, self.x)
        p = torch.cat([1 - p, p], 1) if self.classes == 2 else p
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    def signal(self, w: Tensor, rows: Tensor, labels: Tensor | None = None) -> Tensor:
        """Derivatives of each row's loss by its logits, (n, outputs), with the true labels or others."""
        y = (self.y if labels is None else labels)[rows]
        wanted = y[:, None].double() if self.classes == 2 else torch.nn.functional.one_hot(y, self.classes)
        return self.probabilities(w, self.x[rows]) - wanted

    def gradients(self, w: Tensor, rows: Tensor, labels: Tensor | None = None) -> Tensor:
        """Each row's gradient without the penalty, (n, outputs * d)."""
        return (self.signal(w, rows, labels)[:, :, None] * self.x[rows][:, None]).flatten(1)

    def gradient(self, w: Tensor, rows: Tensor) -> Tensor:
        """The gradient of the objective on some rows, the whole penalty included."""
        return self.gradients(w, rows).sum(0) + self.decay * w.flatten()

    def hessian(self, w: Tensor, rows: Tensor) -> Tensor:
        """The objective's second derivatives on some rows, (outputs * d)^2."""
        p, x = self.probabilities(w, self.x[rows]), self.x[rows]
        bend = p * (1 - p)
        inner = bend[:, :, None] if self.classes == 2 else torch.diag_embed(p) - p[:, :, None] * p[:, None]
        outer = (x[:, :, None] * x[:, None]).flatten(1)
        blocks = (inner.flatten(1).T @ outer).view(*inner.shape[1:], *w.shape[1:], w.shape[1])
        size = w.numel()
        return blocks.transpose(1, 2).reshape(size, size) + self.decay * torch.eye(size, dtype=w.dtype)

    def loss(self, w: Tensor, x: Tensor, y: Tensor) -> float:
        """The mean negative log-likelihood."""
        p = self.probabilities(w, x)
        chosen = (
            torch.where(y == 1, p[:, 0], 1 - p[:, 0]) if self.classes == 2 else p[torch.arange(len(y)), y]
        )
        return float(-chosen.log().mean())

    def accuracy(self, w: Tensor) -> float:
        """Of the test rows."""
        p = self.probabilities(w, self.test_x)
        guess = (p[:, 0] > 0.5).long() if self.classes == 2 else p.argmax(1)
        return float((guess == self.test_y).double().mean())

    @cached_property
    def _inverse(self) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(self.hessian(self.w, torch.arange(len(self.x)))))

    def influential(self, count: int) -> Tensor:
        """The train rows whose loss weighs most in the prediction of the test row that is hardest to get right."""
        p = self.probabilities(self.w, self.test_x)
        hardest = (p - p.round()).abs().amax(1).argmax() if self.classes == 2 else p.amax(1).argmin()
        guess = p[hardest].round() if self.classes == 2 else torch.eye(self.classes)[p[hardest].argmax()]
        query = ((p[hardest] - guess)[:, None] * self.test_x[hardest]).flatten()
        rows = self.gradients(self.w, torch.arange(len(self.x)))
        return (rows @ (self._inverse @ query)).argsort(descending=True)[:count]

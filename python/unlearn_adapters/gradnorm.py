"""The GradNorm membership attack with batches of more than one sample.

The attack scores a text by the mean, over parameter tensors, of the p-norm of its loss's gradient. Evaluators run
it as one backward a text, and raise for batches (the graph of the second text is gone after the first's backward).

Source: the attack of open-unlearning and MIMIR; Wang et al. 2024 (arXiv 2402.17012).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_kernels.per_sample import PerSampleGradients
from unlearn_kernels.per_sample._recorder import Keep

Losses: TypeAlias = Callable[[], Sequence[Tensor] | Tensor]
_before: dict[type, Any] = {}


def gradient_norms(model: nn.Module, losses: Losses, *, p: float = 2, **options: Any) -> Tensor:
    r"""The mean over parameters of `\|\partial n_i / \partial \theta\|_p`, for every sample, from one backward.

    Args:
        model: see `PerSampleGradients`; frozen parameters are left out, and existing gradients stay.
        losses: runs the model and returns every sample's loss, (B,) or a list of B numbers.
        p: 1, 2 or infinity. 2 forms no gradient; the others form one parameter's gradients of one sample at a time.
        options: of `PerSampleGradients`.

    Returns:
        (B,).

    Raises:
        ValueError: if `p` is another number, or `PerSampleGradients` refuses the model.
    """
    if p not in (1, 2, float("inf")):
        raise ValueError(f"p must be 1, 2 or inf, got {p}")
    keep: Keep = "norms" if p == 2 else "factors"
    with PerSampleGradients(model, loss_reduction="sum", keep=keep, **options) as gradients:
        found = losses()
        (found if isinstance(found, Tensor) else torch.stack(list(found))).sum().backward()
        unused = set(gradients.unused())
        if p == 2:
            by = gradients.norms("parameter")
            assert isinstance(by, dict)
            rows = [row for name, row in by.items() if name not in unused]
        else:
            rows = [_norms(use, p) for use in gradients.batch.uses().values()]
    return torch.stack(rows).mean(0)


def _norms(use: Any, p: float) -> Tensor:
    one_by_one = (use.rows(slice(i, i + 1)).grads() for i in range(use.samples))
    return torch.stack([torch.linalg.vector_norm(g, ord=p) for g in one_by_one])


def install(attack: type) -> None:
    """Gives an attack class of open-unlearning's evaluator batches: replaces its `compute_batch_values`.

    Args:
        attack: `evals.metrics.mia.gradnorm.GradNormAttack`, or a class like it: with `model`, `p` and, in its
            module, `tokenwise_logprobs(model, batch, grad=True)`, a list of each sample's log-probabilities.

    Raises:
        ValueError: if the class's module has no `tokenwise_logprobs`.
    """
    if attack in _before:
        return
    source = sys.modules[attack.__module__]
    if not hasattr(source, "tokenwise_logprobs"):
        raise ValueError(f"attack must come from a module with tokenwise_logprobs, got {attack.__module__}")

    def compute_batch_values(self: Any, batch: Mapping[str, Tensor]) -> list[Tensor]:
        """One norm a sample, as the class's own."""

        def losses() -> list[Tensor]:
            return [-x.mean() for x in source.tokenwise_logprobs(self.model, batch, grad=True)]

        return list(gradient_norms(self.model, losses, p=self.p).unbind())

    _before[attack] = attack.compute_batch_values  # type: ignore[attr-defined]
    attack.compute_batch_values = compute_batch_values  # type: ignore[attr-defined]


def uninstall(attack: type) -> None:
    """Puts back what `install` replaced."""
    if attack in _before:
        attack.compute_batch_values = _before.pop(attack)  # type: ignore[attr-defined]

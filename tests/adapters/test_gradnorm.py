import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.per_sample.models import Text, text
from unlearn_adapters import gradnorm
from unlearn_kernels.testing import relative_error

NORMS = [1, 2, float("inf")]


def tokenwise_logprobs(model: nn.Module, batch: dict[str, Tensor], grad: bool = False) -> list[Tensor]:
    """Log-probabilities of each sample's labelled tokens: lists of different lengths."""
    with torch.set_grad_enabled(grad):
        logits = model(batch["input_ids"])[:, :-1]
    labels = batch["labels"][:, 1:]
    logp = -F.cross_entropy(logits.mT, labels.clamp(min=0), reduction="none")
    return [row[known] for row, known in zip(logp, labels != -100, strict=True)]


class Attack:
    """The loop of open-unlearning's attack."""

    def __init__(self, model: nn.Module, p: float) -> None:
        self.model, self.p = model, p

    def compute_batch_values(self, batch):
        norms = []
        for loss in [-lps.mean() for lps in tokenwise_logprobs(self.model, batch, grad=True)]:
            self.model.zero_grad()
            loss.backward()
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            norms.append(torch.stack([g.norm(p=self.p) for g in grads]).mean())
        return norms


@pytest.fixture
def case():
    torch.manual_seed(0)
    ids = text(4, 7)
    labels = ids.clone()
    labels[1, :4] = -100
    labels[2, :2] = -100
    model = Text(tied=True).double()
    model.inner.bias.requires_grad_(False)
    return model, {"input_ids": ids, "labels": labels}


@pytest.fixture
def installed():
    gradnorm.install(Attack)
    gradnorm.install(Attack)
    yield
    gradnorm.uninstall(Attack)


@pytest.mark.parametrize("p", NORMS)
def test_batches_give_what_single_texts_do(case, p):
    model, batch = case
    singles = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
    expected = torch.stack([Attack(model, p).compute_batch_values(one)[0] for one in singles])
    kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    gradnorm.install(Attack)
    try:
        found = Attack(model, p).compute_batch_values(batch)
    finally:
        gradnorm.uninstall(Attack)
    assert isinstance(found, list)
    assert relative_error(torch.stack(found), expected) < 1e-9
    assert all(torch.equal(p.grad, kept[name]) for name, p in model.named_parameters() if name in kept)


def test_the_loop_raises_for_batches_and_is_put_back(case, installed):
    model, batch = case
    assert len(Attack(model, 2).compute_batch_values(batch)) == 4
    gradnorm.uninstall(Attack)
    with pytest.raises(RuntimeError, match="second time"):
        Attack(model, 2).compute_batch_values(batch)


def test_arguments_are_checked(case):
    with pytest.raises(ValueError, match="p must be 1, 2 or inf, got 3"):
        gradnorm.gradient_norms(case[0], list, p=3)
    with pytest.raises(ValueError, match="must come from a module with tokenwise_logprobs"):
        gradnorm.install(nn.Linear)

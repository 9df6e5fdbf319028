"""Unlearning losses as training code writes them: a model is called, its logits are sliced, softmaxed, compared."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Batch = dict[str, Tensor]
WORDS, LENGTH = 211, 13


def batch(seed: int, words: int = WORDS, length: int = LENGTH, samples: int = 3) -> Batch:
    """Prompts, and answers of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, words, (samples, length), generator=generator)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, -3:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def shifted(model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
    outputs = model(**inputs)
    return outputs.logits[..., :-1, :].contiguous(), inputs["labels"][..., 1:].contiguous()


def sums(model: nn.Module, inputs: Batch) -> Tensor:
    logits, labels = shifted(model, inputs)
    each = nn.CrossEntropyLoss(ignore_index=-100, reduction="none")(logits.transpose(-1, -2), labels)
    return each.sum(-1)


def per_token(model: nn.Module, inputs: Batch) -> tuple[Tensor, Tensor]:
    logits, labels = shifted(model, inputs)
    flat = labels.view(-1)
    each = F.cross_entropy(logits.view(-1, logits.size(-1)), flat, reduction="none")
    return each, flat != -100


def grad_diff(model, reference, forget, retain):
    return -0.3 * model(**forget).loss + model(**retain).loss


def npo(model, reference, forget, retain):
    n = sums(model, forget)
    with torch.no_grad():
        r = sums(reference, forget)
    return -2 / 0.1 * F.logsigmoid(0.1 * (n - r)).mean()


def dpo(model, reference, forget, retain):
    win, lose = sums(model, retain), sums(model, forget)
    with torch.no_grad():
        reference_win, reference_lose = sums(reference, retain), sums(reference, forget)
    margin = (reference_win - win) - (reference_lose - lose)
    return -2 / 0.1 * F.logsigmoid(0.1 * margin).mean()


def simnpo(model, reference, forget, retain):
    mean = sums(model, forget) / (forget["labels"] != -100).sum(-1)
    return -2 / 1.5 * F.logsigmoid(1.5 * (mean - 5.0)).mean()


def wga(model, reference, forget, retain):
    each, counts = per_token(model, forget)
    return -((-each).exp().detach() * each)[counts].mean()


def satimp(model, reference, forget, retain):
    each, counts = per_token(model, forget)
    p = (-each).exp().detach()
    return -(p**5 * (1 - p) * each)[counts].mean()


def kl(model, reference, forget, retain):
    with torch.no_grad():
        there = reference(**retain).logits
    target = F.log_softmax(there, dim=-1).view(-1, there.shape[-1])
    here = model(**retain).logits
    log_p = F.log_softmax(here, dim=-1).view(-1, here.shape[-1])
    return F.kl_div(log_p, target, reduction="batchmean", log_target=True)


def undial(model, reference, forget, retain):
    """The label's logit is lowered by way of a mask; -100 counts from the vocabulary's end."""
    logits, labels = shifted(model, forget)
    with torch.no_grad():
        teacher, _ = shifted(reference, forget)
    mask = torch.zeros_like(teacher)
    sample, position = torch.arange(mask.shape[0]), torch.arange(mask.shape[1])
    mask[sample.view(-1, 1, 1), position.view(1, -1, 1), labels.unsqueeze(-1)] = 1.0
    soft = F.softmax(teacher - mask * 10.0, dim=-1)
    each = nn.CrossEntropyLoss(reduction="none")
    return each(logits.view(-1, logits.size(-1)), soft.view(-1, soft.size(-1))).mean()


def ceu(model, reference, forget, retain):
    logits, labels = shifted(model, forget)
    counts = labels != -100
    rows, words = logits[counts], labels[counts]
    target = rows.detach().clone().scatter_(dim=-1, index=words.unsqueeze(-1), value=float("-inf"))
    return F.cross_entropy(rows, F.softmax(target, dim=-1))


def pdu(model, reference, forget, retain):
    logits = model(**forget).logits
    logits = logits.reshape(-1, logits.size(-1))
    counts = (forget["labels"] != -100).reshape(-1)
    spread = (logits.max(dim=-1)[0] - logits.mean(dim=-1)) ** 2
    return (spread * counts).sum() / counts.sum()


def flat(model, reference, forget, retain):
    """Mean probabilities by way of the likelihood loss of probabilities."""

    def probability(inputs: Batch) -> Tensor:
        logits, labels = shifted(model, inputs)
        p = logits.softmax(-1).transpose(1, 2)
        return -F.nll_loss(p, labels, reduction="none").mean()

    return torch.exp(probability(forget) - 1) - probability(retain)


def per_sample_ascent(model, reference, forget, retain):
    """llm_unlearn's loop over the batch."""
    logits, labels = shifted(model, forget)
    return -torch.stack([F.cross_entropy(z, y) for z, y in zip(logits, labels, strict=True)]).mean()


def gathered(model, reference, forget, retain):
    log_p = F.log_softmax(model(**forget).logits, dim=-1)[:, :-1, :]
    words = forget["input_ids"][:, 1:].unsqueeze(-1)
    return -torch.gather(log_p, dim=2, index=words).squeeze(-1).sum()


def selected(model, reference, forget, retain):
    """TRL's log-likelihoods: a logit less its row's log-sum-exp."""
    logits, labels = shifted(model, forget)
    words = labels.clamp_min(0)
    chosen = torch.gather(logits, dim=-1, index=words.unsqueeze(-1)).squeeze(-1)
    totals = torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    return ((totals - chosen) * (labels != -100)).sum()


LOSSES = {
    f.__name__: f
    for f in (
        grad_diff, npo, dpo, simnpo, wga, satimp, kl, undial, ceu, pdu, flat, per_sample_ascent, gathered, selected,
    )
}  # fmt: skip

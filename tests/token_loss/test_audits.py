"""Audits from one pass against plain implementations from full logits in float64; relearning that leaves no trace."""

import math
import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.token_loss.models import Tiny, batches, transformers_model
from unlearn_kernels.token_loss import HiddenRows
from unlearn_kernels.token_loss.audits import (
    Relearning,
    TokenTable,
    aggregate_truth_ratio,
    exact_memorization,
    extraction_strength,
    loss_attack,
    mean_nll,
    min_k,
    min_k_plus_plus,
    probability,
    reference_attack,
    relearned,
    removal_audit,
    token_stats,
    truth_ratio,
    zlib_attack,
)

Sample = tuple[Tensor, Tensor]  # log-probabilities (n, V) and labels (n,)


def logits_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**inputs)
    return (output[0] if isinstance(output, tuple) else output.logits).double()


def published_samples(model: nn.Module, data: list[dict[str, Any]]) -> list[Sample]:
    """As open-unlearning cuts them: without the last labelled token, and by a slice that begins before the first."""
    found = []
    for batch in data:
        log_p = logits_of(model, batch).log_softmax(-1)[:, :-1]
        for row, labels in zip(log_p, batch["labels"], strict=True):
            at = (labels != -100).nonzero()[:, 0][:-1]
            if len(at) == 0:
                found.append((row[:0], labels[:0]))
            else:
                found.append((row[int(at[0]) - 1 : int(at[-1])], labels[at]))
    return found


def all_samples(model: nn.Module, data: list[dict[str, Any]]) -> list[Sample]:
    found = []
    for batch in data:
        log_p, labels = logits_of(model, batch).log_softmax(-1)[:, :-1], batch["labels"][:, 1:]
        found += [(row[y != -100], y[y != -100]) for row, y in zip(log_p, labels, strict=True)]
    return found


def picked(sample: Sample) -> Tensor:
    log_p, labels = sample
    return log_p.gather(1, labels[: len(log_p), None])[:, 0]


def lowest(values: Tensor, k: float, empty: float, least: int = 1) -> float:
    if len(values) == 0:
        return empty
    number = max(least, int(len(values) * k))
    return -float(values.sort().values[:number].mean())


def normalised(sample: Sample) -> Tensor:
    p = sample[0].exp()
    mean = (p * sample[0]).sum(-1)
    variance = (p * (sample[0] - mean[:, None]).square()).sum(-1)
    return (picked(sample) - mean) / variance.clamp_min(1e-6).sqrt()


def strength(sample: Sample) -> float:
    """The loop over suffixes, as published."""
    guesses, labels = sample[0].argmax(-1), sample[1]
    k = 0
    for k in range(len(labels)):
        if torch.equal(guesses[k:], labels[k:]):
            break
    return 1 - k / len(labels) if len(labels) else 0.0


def loss_of(model: nn.Module, data: list[dict[str, Any]], shifted: bool) -> Tensor:
    found = []
    for batch in data:
        labels = batch["labels"][:, 1:]
        logits = logits_of(model, batch)[:, :-1].transpose(1, 2)
        total = nn.functional.cross_entropy(logits, labels, reduction="none").sum(1)
        found.append(total / ((labels if shifted else batch["labels"]) != -100).sum(1))
    return torch.cat(found)


def taught(dtype: torch.dtype = torch.float64, steps: int = 20) -> Tiny:
    """A model that gets some of the tokens right: a bigram of the first batch's texts."""
    model = Tiny(dtype)
    ids = torch.cat([b["input_ids"] for b in data_of()])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model.eval()(ids)[0][:, :-1].flatten(0, 1)
        nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).backward()
        optimizer.step()
    return model


def data_of() -> list[dict[str, Any]]:
    """Texts with answers of 0, 1 and more labels, and one whose first position has a label."""
    data = batches((4, 5, 3), padded=17)
    data[1]["labels"][0] = -100
    data[1]["labels"][1, 5:] = -100
    data[1]["labels"][1, :4] = -100
    data[2]["labels"][1] = data[2]["input_ids"][1]
    return data


@pytest.fixture(scope="module")
def model() -> Tiny:
    return taught().eval()


@pytest.fixture(scope="module")
def table(model: Tiny) -> TokenTable:
    return token_stats(model, data_of())


def check(found: Tensor, expected: Any, **options: Any) -> None:
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10, equal_nan=True, **options)


def test_table_holds_every_token_that_counts(model: Tiny, table: TokenTable) -> None:
    samples = all_samples(model, data_of())
    assert table.keys == list(range(10, 22))
    assert table.lengths.tolist() == [len(y) for _, y in samples]
    assert table.counts.tolist() == [int((y != -100).sum()) for b in data_of() for y in b["labels"]]
    assert torch.equal(table.labels, torch.cat([y for _, y in samples]))
    assert 0.1 < table.hit.double().mean() < 0.9  # or the tests below would say little
    for i, sample in enumerate(samples):
        where = table.tokens(i)
        check(-table.nll[where], picked(sample))
        top = sample[0].topk(2).values
        check(table.margin[where], top[:, 0] - top[:, 1])
        assert torch.equal(table.hit[where], sample[0].argmax(-1) == sample[1])


@pytest.mark.parametrize("fixed", [False, True])
def test_losses_and_probabilities(model: Tiny, table: TokenTable, fixed: bool) -> None:
    expected = loss_of(model, data_of(), fixed)
    check(loss_attack(table, fixed=fixed), expected)
    check(probability(table, fixed=fixed), (-expected).exp())
    assert math.isnan(float(probability(table, fixed=fixed)[4]))
    # The one with a label at its first position is divided by one token more.
    differs = loss_of(model, data_of(), True) != loss_of(model, data_of(), False)
    assert differs.nan_to_num().nonzero().flatten().tolist() == [4, 10]
    texts = [f"text {i} " * (i + 1) for i in range(len(table))]
    sizes = torch.tensor([len(zlib.compress(t.encode())) for t in texts])
    check(zlib_attack(table, texts, fixed=fixed), expected / sizes)
    with pytest.raises(ValueError, match="texts must be one a sample, 12, got 11"):
        zlib_attack(table, texts[1:])


def test_reference_attack(model: Tiny, table: TokenTable) -> None:
    other = Tiny(torch.float64).eval()
    reference = token_stats(other, data_of())
    check(
        reference_attack(table, reference),
        loss_of(model, data_of(), False) - loss_of(other, data_of(), False),
    )
    with pytest.raises(ValueError, match="reference must be of the same samples in the same order"):
        reference_attack(table, token_stats(other, data_of()[:2]))
    moved = data_of()
    moved[0]["labels"][0, 5] += 1
    with pytest.raises(ValueError, match="reference must be of the same labels"):
        reference_attack(table, token_stats(other, moved))


@pytest.mark.parametrize("k", [0.05, 0.2, 0.4, 1.0])
def test_min_k(model: Tiny, table: TokenTable, k: float) -> None:
    cut, whole = published_samples(model, data_of()), all_samples(model, data_of())
    assert len(cut[10][0]) == 0  # the slice that begins at -1
    check(min_k(table, k), [lowest(picked(s), k, 0.0) if len(s[0]) else 0.0 for s in cut])
    check(min_k(table, k, fixed=True), [lowest(picked(s), k, math.nan) for s in whole])
    check(min_k(table, k, dialect="muse"), [lowest(picked(s), k, math.nan, 0) for s in whole])


@pytest.mark.parametrize("k", [0.2, 0.4])
def test_min_k_plus_plus(model: Tiny, table: TokenTable, k: float) -> None:
    cut, whole = published_samples(model, data_of()), all_samples(model, data_of())
    expected = [lowest(normalised(s), k, 0.0) if len(s[0]) else 0.0 for s in cut]
    check(min_k_plus_plus(table, k), expected)
    check(min_k_plus_plus(table, k, fixed=True), [lowest(normalised(s), k, math.nan) for s in whole])
    with pytest.raises(ValueError, match="k must be above 0 and at most 1, got 0"):
        min_k_plus_plus(table, 0)


def test_min_k_plus_plus_clamps_the_variance() -> None:
    flat = Tiny(torch.float64).eval()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
        flat.lm_head.bias.zero_()
        flat.lm_head.bias[3] = 1e-5
    data = data_of()
    table = token_stats(flat, data)
    assert float(table.std.max()) < 1e-3
    expected = [lowest(normalised(s), 0.4, 0.0) if len(s[0]) else 0.0 for s in published_samples(flat, data)]
    torch.testing.assert_close(min_k_plus_plus(table), torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)


def test_memorization(model: Tiny, table: TokenTable) -> None:
    cut, whole = published_samples(model, data_of()), all_samples(model, data_of())
    right = [float((s[0].argmax(-1) == s[1]).double().mean()) if len(s[0]) else math.nan for s in cut]
    check(exact_memorization(table), right)
    check(exact_memorization(table, fixed=True), [(s[0].argmax(-1) == s[1]).double().mean() for s in whole])
    check(extraction_strength(table), [strength(s) for s in cut])


@pytest.mark.filterwarnings("ignore:no token of any sample")
@pytest.mark.parametrize("hits", ["", "1", "0", "01", "10", "000", "0011", "1101", "1111", "0100"])
def test_extraction_strength_of_patterns(hits: str) -> None:
    hit = torch.tensor([c == "1" for c in hits], dtype=torch.bool)
    n, zeros = len(hits), torch.zeros(len(hits))
    table = TokenTable([0], *[torch.tensor([n])] * 2, zeros.long(), zeros, zeros, zeros, hit, zeros)
    rest = len(hits.rsplit("0", 1)[-1])
    assert float(extraction_strength(table, fixed=True)) == pytest.approx(rest / n if n else 0.0)
    cut = hits[:-1]
    k = min(cut.rfind("0") + 1, len(cut) - 1)
    assert float(extraction_strength(table)) == pytest.approx(1 - k / len(cut) if cut else 0.0)


@pytest.mark.parametrize("audit", [min_k, min_k_plus_plus, exact_memorization, extraction_strength])
def test_a_warning_where_publication_leaves_nothing(
    model: Tiny, table: TokenTable, audit: Any, recwarn: pytest.WarningsRecorder
) -> None:
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in data_of()]
    everything = token_stats(model, unlabelled)
    assert audit(table).shape == (12,)
    assert audit(everything, fixed=True).isfinite().all()
    assert not recwarn.list
    with pytest.warns(RuntimeWarning, match="no token of any sample is left as published: first positions"):
        audit(everything)


def test_truth_ratio(model: Tiny) -> None:
    def answers(seed: int) -> list[dict[str, Any]]:
        return batches((3, 2), seed=seed)

    right, wrong = [token_stats(model, answers(1))], [token_stats(model, answers(s)) for s in (2, 3, 4)]
    c = (-loss_of(model, answers(1), False)).exp()
    w = (-torch.stack([loss_of(model, answers(s), False) for s in (2, 3, 4)]).mean(0)).exp()
    found = truth_ratio(right, wrong)
    check(found, w / (c + 1e-10))
    check(truth_ratio(right[0], wrong, dialect="prob_mean"), c / (c + w + 1e-10))
    x = (w / (c + 1e-10)).numpy()
    assert aggregate_truth_ratio(found, "true_better") == pytest.approx((1 - x).clip(0).mean())
    closer = [min(v, 1 / (v + 1e-10)) for v in x]
    assert aggregate_truth_ratio(found, "closer_to_1_better") == pytest.approx(sum(closer) / len(closer))
    assert aggregate_truth_ratio(found, "prob_mean") == pytest.approx(x.mean())
    with pytest.raises(ValueError, match="wrong must be at least one table, got none"):
        truth_ratio(right, [])
    with pytest.raises(ValueError, match="how must be one of"):
        aggregate_truth_ratio(found, "mean")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_near(model: Tiny, dtype: torch.dtype) -> None:
    rounded = Tiny(dtype).eval()
    rounded.load_state_dict(model.state_dict())
    # The body runs in that dtype in either; only the head's rows are compared.
    found = token_stats(rounded, data_of())
    exact = token_stats(rounded, data_of(), rows=exact_rows)
    assert found.nll.dtype == torch.float32
    for score in (loss_attack, min_k, min_k_plus_plus):
        torch.testing.assert_close(score(found), score(exact), rtol=2e-5, atol=1e-5, equal_nan=True)


def exact_rows(model: nn.Module, batch: Any) -> HiddenRows:
    from unlearn_kernels.token_loss import hidden_rows

    made = hidden_rows(model, batch)
    bias = made.options["bias"]
    options = made.options | {"bias": None if bias is None else bias.double()}
    return made._replace(h=made.h.double(), W=made.W.double(), options=options)  # type: ignore[arg-type]


def test_models_of_transformers_and_modes() -> None:
    pytest.importorskip("transformers")
    model = transformers_model("gemma2").train()
    model.model.norm.eval()
    data = data_of()
    table = token_stats(model, data)
    assert model.training
    assert not model.model.norm.training
    torch.testing.assert_close(
        loss_attack(table), loss_of(model.eval(), data, False), rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_keys(model: Tiny) -> None:
    data = batches((2, 2))
    seen: list[int] = []
    nameless = [{k: v for k, v in b.items() if k != "index"} for b in data]
    assert token_stats(model, nameless, progress=seen.append).keys == [0, 1, 2, 3]
    assert seen == [2, 4]
    with pytest.raises(ValueError, match="keys must differ, got 4 samples of 2 keys"):
        token_stats(model, [data[0], data[0]])
    assert len(token_stats(model, [])) == 0
    assert min_k(token_stats(model, [])).shape == (0,)


# Relearning.


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
    }


def unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for name, weight in before["weights"].items():
        assert torch.equal(weight.view(torch.uint8), after["weights"][name].view(torch.uint8)), name
    assert after["flags"] == before["flags"]
    assert after["modes"] == before["modes"]
    assert all(a is b for a, b in zip(after["grads"], before["grads"], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_relearning_restores_everything_to_the_bit(dtype: torch.dtype, tied: bool) -> None:
    model, data = Tiny(dtype, tied=tied), batches((3, 2))
    model.register_buffer("steps", torch.full((2,), float("nan")))
    model.mix.requires_grad_(False)
    model.dropout.eval()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    before = snapshot(model)
    start = mean_nll(model, data)
    with relearned(model, data, Relearning(20, 1e-2)) as taught_model:
        assert taught_model is model
        assert not torch.equal(model.mix.weight, before["weights"]["mix.weight"])  # frozen or not
        assert mean_nll(model, data) < start - 0.5
    unchanged(model, before)
    with pytest.raises(RuntimeError, match="on purpose"), relearned(model, data, Relearning(2)):
        raise RuntimeError("on purpose")
    unchanged(model, before)


def test_relearning_of_some_parameters_with_another_optimizer() -> None:
    model, data = Tiny(), batches((3,))
    before = snapshot(model)
    sgd = Relearning(3, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    results = []
    for _ in range(2):
        with relearned(model, data, sgd, parameters=[model.lm_head.bias]):
            assert torch.equal(model.mix.weight, before["weights"]["mix.weight"])
            results.append(model.lm_head.bias.detach().clone())
    assert torch.equal(*results)
    unchanged(model, before)
    with pytest.raises(ValueError, match="batches must be at least one"):
        relearned(model, [], sgd).__enter__()
    with pytest.raises(ValueError, match="parameters must be at least one"):
        relearned(model, data, sgd, parameters=[]).__enter__()
    with pytest.raises(ValueError, match="steps must not be negative, got -1"):
        Relearning(-1)


def test_the_audit_tells_suppression_from_removal() -> None:
    target, control = data_of()[:1], batches((4,), seed=7, padded=17)
    knows: Tiny = taught(torch.float32, 60).eval()
    before = mean_nll(knows, target)

    suppressed = Tiny().eval()
    suppressed.load_state_dict(knows.state_dict())
    with torch.no_grad():  # the same knowledge behind a bias that hides its words
        suppressed.lm_head.bias[target[0]["labels"][target[0]["labels"] != -100].unique()] -= 8.0
    removed = Tiny().eval()  # never saw anything

    steps = Relearning(8, 2e-2)
    audits = {
        name: removal_audit(m, target, target, control=control, before=before, relearning=steps)
        for name, m in (("suppressed", suppressed), ("removed", removed))
    }
    hidden, gone = audits["suppressed"], audits["removed"]
    assert hidden.target > before + 1
    assert hidden.recovered > gone.recovered
    assert hidden.relearned < gone.relearned
    assert hidden.paraphrases == hidden.target
    assert hidden.spared == pytest.approx(0.0)
    assert hidden.gain == pytest.approx(hidden.target - hidden.relearned)
    assert hidden.savings == pytest.approx(hidden.gain - (hidden.control - hidden.relearned_control))
    listed, generated = (
        removal_audit(removed, target, control=control, relearning=steps, parameters=parameters)
        for parameters in (list(removed.parameters()), removed.parameters())
    )
    assert generated == listed
    bare = removal_audit(removed, target, relearning=Relearning(0))
    assert bare.relearned == bare.target
    assert (bare.paraphrases, bare.control, bare.savings, bare.recovered, bare.spared) == (None,) * 5

"""Every loss and dialect against the formula of the repository it comes from, on materialised logits in float64."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from unlearn_kernels import token_loss as tl
from unlearn_kernels.testing import assert_as_exact_as, randn

Loss = Callable[..., Tensor]
B, T, D, V = 4, 9, 12, 131


class Batch(NamedTuple):
    """Two batches of hidden states, a head and a reference model; everything else is fixed."""

    h: Tensor
    W: Tensor
    g: Tensor
    ref_h: Tensor
    ref_head: Tensor


def labels_of(seed: int, length: int = T) -> Tensor:
    y = torch.randint(0, V, (B, length), generator=torch.Generator().manual_seed(seed))
    y[:, : seed % 3 + 1] = -100
    y[1, 5:] = -100
    return y


Y, Y2 = labels_of(1), labels_of(2, 7)
SUMS, SUMS2 = 20 + 3 * randn(B, seed=8).double(), 25 + 3 * randn(B, seed=9).double()
TOKENS = randn(B, T, seed=10).double().abs() * 3


def batch(dtype: torch.dtype) -> Batch:
    shapes = ((B, T, D), (V, D), (B, 7, D), (B, T, D + 3), (V, D + 3))
    parts = [
        randn(*shape, seed=i) * (1.5 * D**-0.5 if len(shape) == 2 else 1) for i, shape in enumerate(shapes)
    ]
    return Batch(*(part.to(dtype) for part in parts))


def logits(x: Batch, which: str = "policy") -> Tensor:
    h, W = {"policy": (x.h, x.W), "other": (x.g, x.W), "reference": (x.ref_h, x.ref_head)}[which]
    return h @ W.T


def nll(z: Tensor, y: Tensor = Y) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)


def log_p(z: Tensor) -> Tensor:
    return z.log_softmax(-1)


def log_sigmoid(x: Tensor) -> Tensor:
    return torch.log(torch.sigmoid(x))


def ascent(x: Batch, weight: Callable[[Tensor], Tensor]) -> Tensor:
    n = nll(logits(x))[Y != -100]
    return -(weight((-n).exp()).detach() * n).mean()


def token_npo(x: Batch, beta: float, alpha: float) -> Tensor:
    q = (-TOKENS.to(x.h.dtype)).exp()[Y != -100]
    return ascent(x, lambda p: 2 * p ** (beta + alpha) / (p**beta + q**beta + 1e-5))


def undial_literally(x: Batch, fixed: bool) -> Tensor:
    teacher = logits(x, "reference").flatten(0, 1)
    z, y = logits(x).flatten(0, 1), Y.flatten()
    if fixed:
        teacher, z, y = (t[Y.flatten() != -100] for t in (teacher, z, y))
    mask = torch.zeros_like(teacher)
    mask[torch.arange(len(mask)), y] = 1.0  # -100 counts from the end, as it does in the source
    return -((teacher - mask * 10.0).softmax(-1) * log_p(z)).sum(-1).mean()


def ceu_literally(x: Batch, skip: int) -> Tensor:
    kept = Y.clone()
    for row in kept:
        answer = (row != -100).nonzero()[:skip]
        row[answer] = -100
    z, y = logits(x)[kept != -100], kept[kept != -100]
    other = z.masked_fill(F.one_hot(y, V).bool(), -torch.inf).softmax(-1).detach()
    return F.cross_entropy(z, other)


def kl_literally(x: Batch, rows: Tensor | None = None) -> Tensor:
    p, q = log_p(logits(x)), log_p(logits(x, "reference"))
    return F.kl_div(*(t[torch.ones_like(Y) == 1 if rows is None else rows] for t in (p, q)), reduction="batchmean",
                    log_target=True)  # fmt: skip


def soul_kl(x: Batch) -> Tensor:
    p, q = logits(x).softmax(-1), logits(x, "reference").softmax(-1)
    return -(p * torch.log(q + 1e-12)).sum(-1).mean()


def llm_unlearn_kl(x: Batch) -> Tensor:
    p, q = logits(x).softmax(-1), logits(x, "reference").softmax(-1)
    return -(q * torch.log(p + 1e-12)).sum(-1).mean()


def muse_kl(x: Batch) -> Tensor:
    return F.kl_div(logits(x), logits(x, "reference"), reduction="batchmean", log_target=True)


def mean_probability(z: Tensor, y: Tensor, fixed: bool) -> Tensor:
    p = (-nll(z, y)).exp() * (y != -100)
    return p.sum() / ((y != -100).sum() if fixed else y.numel())


def flat_literally(x: Batch, f: Callable[[Tensor, Tensor], Tensor], fixed: bool = False) -> Tensor:
    a, b = mean_probability(logits(x, "other"), Y2, fixed), mean_probability(logits(x), Y, fixed)
    return f(a, b)


def dpo_literally(x: Batch, scale: float, references: bool = True) -> Tensor:
    r, s = (0 * SUMS, 0 * SUMS2) if not references else (SUMS, SUMS2)
    win, lose = s.to(x.h.dtype) - nll(logits(x, "other"), Y2).sum(1), r.to(x.h.dtype) - nll(logits(x)).sum(1)
    return -scale * log_sigmoid(0.1 * (win - lose)).mean()


def pair(x: Batch) -> tuple[Tensor, Tensor]:
    return x.ref_h, x.ref_head


def win_lose(x: Batch, **options: Any) -> Tensor:
    return tl.dpo((x.g, Y2), (x.h, Y), x.W, SUMS2, SUMS, **options)


def counted(y: Tensor = Y) -> Tensor:
    return (y != -100).sum(1)


def flat_of(divergence: str, fixed: bool = False) -> Loss:
    return lambda x: tl.flat((x.h, Y), (x.g, Y2), x.W, divergence=divergence, fixed=fixed)  # type: ignore[arg-type]


def token_mean(x: Batch) -> Tensor:
    return nll(logits(x)).sum() / (Y != -100).sum()


# name: ours, and the formula.
CASES: dict[str, tuple[Loss, Loss]] = {
    "grad_ascent": (
        lambda x: tl.grad_ascent(x.h, x.W, Y),
        lambda x: -F.cross_entropy(logits(x).flatten(0, 1), Y.flatten()),
    ),
    "grad_ascent llm_unlearn": (
        lambda x: tl.grad_ascent(x.h, x.W, Y, dialect="llm_unlearn"),
        lambda x: -(nll(logits(x)).sum(1) / counted()).mean(),
    ),
    "grad_diff": (
        lambda x: tl.grad_diff((x.h, Y), (x.g, Y2), x.W, gamma=0.7, alpha=1.3),
        lambda x: (
            -0.7 * token_mean(x) + 1.3 * F.cross_entropy(logits(x, "other").flatten(0, 1), Y2.flatten())
        ),
    ),
    "idk": (
        lambda x: tl.idk((x.g, Y2), (x.h, Y), x.W),
        lambda x: F.cross_entropy(
            torch.cat([logits(x, "other").flatten(0, 1), logits(x).flatten(0, 1)]),
            torch.cat([Y2.flatten(), Y.flatten()]),
        ),
    ),
    "npo": (
        lambda x: tl.npo(x.h, x.W, Y, SUMS, beta=0.1),
        lambda x: -20 * log_sigmoid(0.1 * (nll(logits(x)).sum(1) - SUMS.to(x.h.dtype))).mean(),
    ),
    "npo soul": (
        lambda x: tl.npo(x.h, x.W, Y, SUMS, beta=0.1, dialect="soul"),
        lambda x: -20 * log_sigmoid(0.1 * (token_mean(x) - (SUMS.sum() / counted().sum()).to(x.h.dtype))),
    ),
    "npo erasus": (
        lambda x: tl.npo(x.h, x.W, Y, SUMS, beta=0.3, dialect="erasus"),
        lambda x: -log_sigmoid(0.3 * (nll(logits(x)).sum(1) - SUMS.to(x.h.dtype))).mean(),
    ),
    "npo muse": (
        lambda x: tl.npo(x.h, x.W, Y, beta=0.1, dialect="muse", reference=pair(x)),
        lambda x: -20 * log_sigmoid(0.1 * (logits(x, "reference") - logits(x))).mean(),
    ),
    "simnpo": (
        lambda x: tl.simnpo(x.h, x.W, Y, delta=0.3),
        lambda x: -2 / 4.5 * log_sigmoid(4.5 * (nll(logits(x)).sum(1) / counted() - 0.3)).mean(),
    ),
    "simnpo lengths before the shift": (
        lambda x: tl.simnpo(x.h, x.W, Y, beta=0.5, lengths=counted() + 1),
        lambda x: -4 * log_sigmoid(0.5 * nll(logits(x)).sum(1) / (counted() + 1)).mean(),
    ),
    "simnpo wmdp": (
        lambda x: tl.simnpo(x.h, x.W, Y, beta=0.5, delta=0.1, dialect="wmdp"),
        lambda x: -4 * log_sigmoid(0.5 * (token_mean(x) - 0.1)),
    ),
    "simnpo muse": (
        lambda x: tl.simnpo(x.h, x.W, Y, beta=0.5, delta=0.2, dialect="muse"),
        lambda x: -4 * log_sigmoid(0.5 * (-logits(x) - 0.2)).mean(),
    ),
    "tnpo": (lambda x: tl.tnpo(x.h, x.W, Y, TOKENS, beta=0.5), lambda x: token_npo(x, 0.5, 0.0)),
    "wtnpo": (lambda x: tl.wtnpo(x.h, x.W, Y, TOKENS, beta=0.5), lambda x: token_npo(x, 0.5, 0.5)),
    "wtnpo alpha": (
        lambda x: tl.wtnpo(x.h, x.W, Y, TOKENS, beta=0.5, alpha=0.2),
        lambda x: token_npo(x, 0.5, 0.2),
    ),
    "dpo": (win_lose, lambda x: dpo_literally(x, 20)),
    "dpo tofu": (lambda x: win_lose(x, dialect="tofu"), lambda x: dpo_literally(x, 1)),
    "dpo flat": (lambda x: win_lose(x, dialect="flat"), lambda x: dpo_literally(x, 20, False)),
    "wga": (lambda x: tl.wga(x.h, x.W, Y, beta=0.7), lambda x: ascent(x, lambda p: p**0.7)),
    "satimp": (
        lambda x: tl.satimp(x.h, x.W, Y, beta1=0.5, beta2=2.0),
        lambda x: ascent(x, lambda p: p**0.5 * (1 - p) ** 2),
    ),
    "kl": (lambda x: tl.kl_retain(x.h, x.W, pair(x)), kl_literally),
    "kl labelled": (
        lambda x: tl.kl_retain(x.h, x.W, pair(x), Y),
        lambda x: kl_literally(x, Y != -100),
    ),
    "kl llm_unlearn": (lambda x: tl.kl_retain(x.h, x.W, pair(x), dialect="llm_unlearn"), llm_unlearn_kl),
    "kl soul": (lambda x: tl.kl_retain(x.h, x.W, pair(x), dialect="soul"), soul_kl),
    "kl muse": (lambda x: tl.kl_retain(x.h, x.W, pair(x), dialect="muse"), muse_kl),
    "undial": (lambda x: tl.undial(x.h, x.W, Y, pair(x)), lambda x: undial_literally(x, False)),
    "undial fixed": (
        lambda x: tl.undial(x.h, x.W, Y, pair(x), fixed=True),
        lambda x: undial_literally(x, True),
    ),
    "ceu": (lambda x: tl.ceu(x.h, x.W, Y), lambda x: ceu_literally(x, 1)),
    "ceu all": (lambda x: tl.ceu(x.h, x.W, Y, skip=0), lambda x: ceu_literally(x, 0)),
    "pdu": (
        lambda x: tl.pdu(x.h, x.W, Y),
        lambda x: (logits(x).amax(-1) - logits(x).mean(-1))[Y != -100].square().mean(),
    ),
    "flat tv": (flat_of("tv"), lambda x: flat_literally(x, lambda a, b: (b.tanh() - a.tanh()) / 2)),
    "flat kl": (flat_of("kl"), lambda x: flat_literally(x, lambda a, b: -a + (b - 1).exp())),
    "flat reverse_kl": (
        flat_of("reverse_kl"),
        lambda x: flat_literally(x, lambda a, b: a.exp() - 1 - b),
    ),
    "flat jeffrey": (
        flat_of("jeffrey"),
        lambda x: flat_literally(x, lambda a, b: -a + b + b**2 / 4 + b**3 / 16),
    ),
    "flat squared_hellinger": (
        flat_of("squared_hellinger"),
        lambda x: flat_literally(x, lambda a, b: a.exp() + (-b).exp() - 2),
    ),
    "flat pearson": (flat_of("pearson"), lambda x: flat_literally(x, lambda a, b: -a + b + b**2 / 4)),
    "flat neyman": (
        flat_of("neyman"),
        lambda x: flat_literally(x, lambda a, b: a.exp() + 1 - 2 * (1 - b).sqrt()),
    ),
    "flat js": (
        flat_of("js"),
        lambda x: flat_literally(
            x,
            lambda a, b: (1 + (-a).exp()).log() + b + (1 + (-b).exp()).log() - math.log(4),
        ),
    ),
    "flat fixed": (
        flat_of("squared_hellinger", True),
        lambda x: flat_literally(x, lambda a, b: (-a).exp() + b.exp() - 2, True),
    ),
}
EACH = pytest.mark.parametrize("name", CASES)


def with_gradients(loss: Loss, dtype: torch.dtype) -> dict[str, Tensor]:
    x = batch(dtype)
    leaves = [part.requires_grad_() for part in x[:3]]
    value = loss(x)
    found = torch.autograd.grad(value, leaves, allow_unused=True)
    named = {"loss": value.detach(), **dict(zip(("h", "W", "g"), found, strict=True))}
    return {name: part for name, part in named.items() if part is not None}


@EACH
def test_value_and_gradients(name: str) -> None:
    ours, formula = CASES[name]
    actual, eager, exact = (
        with_gradients(ours, torch.float32),
        with_gradients(formula, torch.float32),
        with_gradients(formula, torch.float64),
    )
    assert actual.keys() == exact.keys()
    for part, value in actual.items():
        assert_as_exact_as(part, value, exact[part], eager[part], factor=4)


@EACH
def test_float64(name: str) -> None:
    # The sources' 1e-12 beside a probability is what SOUL and llm_unlearn may differ by.
    ours, formula = (with_gradients(loss, torch.float64) for loss in CASES[name])
    for part, value in ours.items():
        torch.testing.assert_close(value, formula[part], rtol=1e-7, atol=1e-9)


def test_descent_of_flat_lowers_the_forgotten_answer_when_fixed() -> None:
    for divergence in ("reverse_kl", "squared_hellinger"):
        for fixed in (False, True):
            h, g = (torch.ones(1, 1, 2).requires_grad_() for _ in range(2))
            y = torch.zeros(1, 1, dtype=torch.long)
            loss = tl.flat((h, y), (g, y), torch.eye(2) * 0.5 + 0.25, divergence=divergence, fixed=fixed)
            forget, refusal = torch.autograd.grad(loss, (h, g))
            # Along d log p_0 / dh = (1 - p_0) (W_0 - W_1), up is what descent does where the slope is below 0.
            assert ((forget[0, 0, 0] > 0).item(), (refusal[0, 0, 0] < 0).item()) == (fixed, fixed)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: tl.wga(x.h, x.W, y),
        lambda x, y: tl.ceu(x.h, x.W, y),
        lambda x, y: tl.grad_ascent(x.h, x.W, y, dialect="llm_unlearn"),
        lambda x, y: tl.simnpo(x.h, x.W, y),
        lambda x, y: tl.undial(x.h, x.W, y, (x.ref_h, x.ref_head)),
        lambda x, y: tl.linear_stats(x.h, x.W, y).hit.sum(),
    ],
)
def test_labels_of_a_byte(call: Loss) -> None:
    x = batch(torch.float32)
    x = x._replace(W=randn(200, D, seed=5), ref_head=randn(200, D + 3, seed=6))
    labels = tl.linear_stats(x.h, x.W).argmax  # hits, with words of 156 = -100 mod 256 among them
    labels[0, :4], x.h[1, :3] = 156, x.W[156] * 9
    labels[1, :3] = 156
    assert torch.equal(call(x, labels.to(torch.uint8)), call(x, labels))


def test_sequences_without_labels() -> None:
    h, W = randn(2, 3, 4), randn(7, 4, seed=1)
    y = torch.tensor([[1, 2, 3], [-100] * 3])
    assert tl.simnpo(h, W, y).isnan()
    torch.testing.assert_close(tl.simnpo(h, W, y, fixed=True), tl.simnpo(h[:1], W, y[:1]))
    W.requires_grad_()
    (gradient,) = torch.autograd.grad(tl.simnpo(h, W, y, fixed=True), W)
    assert gradient.isfinite().all()


def test_undial_needs_the_word_that_its_quirk_lowers() -> None:
    h, W, y = randn(1, 2, 4), randn(7, 4, seed=1), torch.tensor([[1, -100]])
    for ignored in (-100, -8, 0, 7):
        labels, message = (
            y.masked_fill(y == -100, ignored),
            rf"ignore_index must be in \[-7, 0\).*got {ignored}$",
        )
        with pytest.raises(ValueError, match=message):
            tl.undial(h, W, labels, (h, W), ignore_index=ignored)
        assert tl.undial(h, W, torch.ones_like(y), (h, W), ignore_index=ignored).isfinite()
    with pytest.raises(ValueError, match=r"labels must be in \[0, 7\), got 9"):
        tl.undial(h, W, y.clamp_min(9), (h, W))
    assert tl.undial(h, W, y, (h, W), fixed=True).isfinite()
    assert tl.undial(h, W, y.clamp_min(-1), (h, W), ignore_index=-1).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rmu(dtype: torch.dtype) -> None:
    a, c = randn(3, 5, 7, dtype=dtype).requires_grad_(), tl.control_vector(7, dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    value = tl.rmu(a, c, mask)
    expected = sum(
        ((a[s, mask[s] == 1].double() - c.double()) ** 2).mean(-1).mean() for s in range(3)
    ) / torch.tensor(3.0)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    (ours,), (exact,) = torch.autograd.grad(value, a), torch.autograd.grad(expected, a)
    torch.testing.assert_close(ours, exact.to(dtype))
    torch.testing.assert_close(
        tl.rmu(a, a.detach() * 0.5), (0.5 * a.detach().to(value.dtype)).square().mean()
    )


def test_rmu_sequences_without_tokens() -> None:
    a, mask = randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert tl.rmu(a, torch.zeros(4), mask).isnan()
    torch.testing.assert_close(tl.rmu(a, torch.zeros(4), mask, fixed=True), a[0, :2].square().mean())


def test_control_vector() -> None:
    draws = [tl.control_vector(9, steering=6.5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    torch.testing.assert_close(draws[0].norm(), torch.tensor(6.5))
    assert (draws[0] >= 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda h, W, y: tl.npo(h, W, y, torch.zeros(4), dialect="tofu"),
            "dialect must be one of open_unlearning,",
        ),
        (lambda h, W, y: tl.npo(h, W, y), "reference_nll must be given for open_unlearning"),
        (lambda h, W, y: tl.npo(h, W, y, dialect="muse"), "reference must be the reference's"),
        (lambda h, W, y: tl.npo(h, W, y, torch.zeros(4), beta=-1), "beta must be positive, got -1"),
        (
            lambda h, W, y: tl.simnpo(h, W, y, lengths=torch.ones(3)),
            r"lengths must have one value a sequence, \(4,\)",
        ),
        (
            lambda h, W, y: tl.tnpo(h, W, y, torch.zeros(4)),
            r"reference_nll must have one value a token, \(4, 9\)",
        ),
        (
            lambda h, W, y: tl.dpo((h, y), (h[:2], y[:2]), W),
            "win and lose must have as many sequences, got 4 and 2",
        ),
        (lambda h, W, y: tl.dpo((h, y), (h, y), W), "reference_win must be given for open_unlearning"),
        (lambda h, W, y: tl.flat((h, y), (h, y), W, divergence="l2"), "divergence must be one of tv,"),
        (lambda h, W, y: tl.ceu(h, W, y, skip=-1), "skip must not be negative, got -1"),
        (lambda h, W, y: tl.kl_retain(h, W, (h, W), dialect="npo"), "dialect must be one of"),
        (lambda h, W, y: tl.rmu(h[0], W), r"activations must have shape \(B, T, d\), got \(9, 12\)"),
        (lambda h, W, y: tl.rmu(h, W), "target must be broadcastable"),
        (
            lambda h, W, y: tl.rmu(h[:1, :1], h),
            r"target must be broadcastable to activations \(1, 1, 12\), got \(4, 9, 12\)",
        ),
        (lambda h, W, y: tl.rmu(h, h[None]), r"target must be broadcastable .* got \(1, 4, 9, 12\)"),
        *[
            (call, r"labels must have shape \(B, \.\.\.\), got \(\)")
            for call in (
                lambda h, W, y: tl.simnpo(h[0, 0], W, y[0, 3]),
                lambda h, W, y: tl.grad_ascent(h[0, 0], W, y[0, 3], dialect="llm_unlearn"),
                lambda h, W, y: tl.npo(h[0, 0], W, y[0, 3], torch.zeros(())),
                lambda h, W, y: tl.dpo((h[0, 0], y[0, 3]), (h[0, 0], y[0, 3]), W, dialect="flat"),
                lambda h, W, y: tl.ceu(h[0, 0], W, y[0, 3]),
            )
        ],
        (lambda h, W, y: tl.linear_soft_ce(h, W[:1], y), "W must have words besides the label .*, got 1"),
        (lambda h, W, y: tl.rmu(h, W[0], y[:2]), r"mask must have shape \(4, 9\), got \(2, 9\)"),
    ],
)
def test_misuse(call: Loss, message: str) -> None:
    x = batch(torch.float32)
    with pytest.raises(ValueError, match=message):
        call(x.h, x.W, Y)

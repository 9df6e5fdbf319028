"""Every operation on lazy logits against the same on the logits themselves, in float64."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.token_loss.handles import FULL, LABELS, B, D, T, V, head, hidden, made
from unlearn_kernels.testing import randn
from unlearn_kernels.token_loss import LazyLogits, lazy_logits

CLASS_WEIGHTS = torch.arange(1.0, V + 1, dtype=torch.float64)


def other(z: Tensor) -> Tensor:
    """The logits of a reference, lazy if these are."""
    made = head().requires_grad_(False)
    made.weight.mul_(-0.5)
    h = randn(B, T, D, dtype=torch.float64, seed=5)
    if isinstance(z, LazyLogits):
        lazy_logits(nn.Sequential(), head=made, strict=z.rows.strict)
    return made(h)


# What folds. Results that are lazy themselves are compared as tensors.
FOLDED = {
    "shift": lambda z: z[..., :-1, :].contiguous(),
    "sample": lambda z: z[1],
    "some": lambda z: z[:, [0, 3]],
    "mask": lambda z: z[LABELS != -100],
    "mask_and_ellipsis": lambda z: z[LABELS != -100, ...],
    "none": lambda z: z[:, None, 1:3],
    "last_position": lambda z: z[:, -1],
    "last_position_whole": lambda z: z[:, -1, :],
    "words_of_rows": lambda z: z[torch.arange(B)[:, None], torch.arange(T), FULL],
    "one_word": lambda z: z[..., 3],
    "some_words": lambda z: z[..., torch.tensor([4, 1])],
    "some_words_likelihoods": lambda z: z.log_softmax(-1)[..., [4, 1]],
    "one_word_from_the_end": lambda z: z[:, 1:, -2] + z.log_softmax(-1)[:, :-1, torch.tensor(-1)],
    "words_from_the_end": lambda z: z[..., [-1, 2]] + z[[0]][..., np.array([-V, 0])],
    "words_of_rows_from_the_end": lambda z: z.softmax(-1)[[0, 1], [1, 2], [-1, -V]],
    "numpy_mask": lambda z: z[(LABELS != -100).numpy()],
    "numpy_number": lambda z: z[np.int64(1), :, np.int64(3)],
    "flat": lambda z: z.view(-1, V),
    "flat_inferred": lambda z: z.reshape(B * T, -1),
    "flatten": lambda z: z.flatten(0, 1),
    "transpose": lambda z: z.transpose(1, 2),
    "permute_and_back": lambda z: z.permute(2, 0, 1).permute(1, 2, 0)[:, 1],
    "movedim": lambda z: z.movedim(-1, 0),
    "matrix_transpose": lambda z: z[0].T,
    "squeeze": lambda z: z[:, :1].squeeze(1).unsqueeze(0),
    "unbind": lambda z: torch.stack([x.logsumexp(-1) for x in z]),
    "chunk": lambda z: z.chunk(2, dim=1)[1],
    "split": lambda z: torch.split(z, [1, 4], dim=1)[1],
    "narrow": lambda z: z.narrow(1, 1, 3).select(0, 1),
    "index_select": lambda z: z.index_select(1, torch.tensor([2, 2, 0])),
    "casts": lambda z: z.to(torch.float64).double().to(z).type_as(z).cpu(),
    "copy": lambda z: z.to(torch.float64, copy=True).clone(),
    "detach": lambda z: z.detach() + 0 * z[..., :1].sum() if not isinstance(z, LazyLogits) else z.detach(),
    "scaled": lambda z: -z / 0.7 * 1.3,
    "softcap": lambda z: 3.0 * torch.tanh(z / 3.0),
    "softcap_scaled": lambda z: 2 * (3.0 * torch.tanh(z / 3.0)),
    "softmax": lambda z: z.softmax(dim=-1),
    "log_of_softmax": lambda z: torch.log(torch.softmax(z, -1)),
    "exp_of_log_softmax": lambda z: F.log_softmax(z, dim=2).exp(),
    "ce": lambda z: F.cross_entropy(z.flatten(0, 1), LABELS.flatten()),
    "ce_sum": lambda z: nn.CrossEntropyLoss(reduction="sum")(z.flatten(0, 1), LABELS.flatten()),
    "ce_none": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS, reduction="none"),
    "ce_ignoring": lambda z: F.cross_entropy(z[0], FULL[0], ignore_index=3),
    "ce_weighted": lambda z: F.cross_entropy(z[0], LABELS[0], weight=CLASS_WEIGHTS),
    "ce_of_a_row": lambda z: F.cross_entropy(z[1][2:3], torch.tensor([3])),
    "ce_capped": lambda z: F.cross_entropy((2 * torch.tanh(z / 2)).mT, LABELS),
    "nll": lambda z: F.nll_loss(z.log_softmax(-1).flatten(0, 1), LABELS.flatten()),
    "nll_of_probabilities": lambda z: F.nll_loss(z.softmax(-1).transpose(1, 2), LABELS),
    "gather": lambda z: z.gather(-1, FULL.unsqueeze(-1)),
    "gather_likelihood": lambda z: torch.take_along_dim(z.log_softmax(-1), FULL.unsqueeze(-1), dim=-1),
    "gather_probability": lambda z: z.softmax(-1).gather(2, FULL.unsqueeze(-1)).squeeze(-1),
    "gather_capped": lambda z: (2 * torch.tanh(z / 2)).gather(-1, FULL.unsqueeze(-1)),
    "logsumexp": lambda z: torch.logsumexp(z, -1, keepdim=True),
    "argmax": lambda z: z.argmax(-1),
    "argmax_of_likelihoods": lambda z: z.log_softmax(-1).argmax(dim=-1, keepdim=True),
    "max": lambda z: z.max(dim=-1).values,
    "max_words": lambda z: torch.max(z, -1, keepdim=True).indices,
    "amax": lambda z: z.amax(-1),
    "mean": lambda z: z.mean(dim=(-1,)),
    "kl": lambda z: F.kl_div(
        z.log_softmax(-1), other(z).log_softmax(-1), reduction="batchmean", log_target=True
    ),
    "kl_of_probabilities": lambda z: F.kl_div(z.log_softmax(-1), other(z).softmax(-1), reduction="sum"),
    "kl_reversed": lambda z: F.kl_div(
        other(z).log_softmax(-1), z.log_softmax(-1), reduction="mean", log_target=True
    ),
    "kl_at_temperatures": lambda z: F.kl_div(
        (z / 2).log_softmax(-1), (other(z) / 3).softmax(-1), reduction="batchmean"
    ),
    "soft_target": lambda z: F.cross_entropy(z.mT, other(z).softmax(-1).mT),
    "soft_target_none": lambda z: F.cross_entropy(z[0], other(z)[0].softmax(-1), reduction="none"),
    "lowered_by_scatter": lambda z: F.cross_entropy(
        z[0], (other(z)[0] - torch.zeros_like(z[0]).scatter_(1, FULL[0][:, None], 2.5)).softmax(-1)
    ),
    "taken_out": lambda z: F.cross_entropy(
        z[0], z[0].detach().scatter(-1, FULL[0][:, None], -torch.inf).softmax(-1)
    ),
}

# What makes the tensor: the numbers are the same, and under strict it raises.
MADE = {
    "sum": lambda z: z.sum(),
    "some_of_the_words": lambda z: z[..., 1:3],
    "times_a_tensor": lambda z: z * z.new_ones(V),
    "smoothed": lambda z: F.cross_entropy(z[0], LABELS[0], label_smoothing=0.1),
    "elementwise_kl": lambda z: F.kl_div(z.log_softmax(-1), other(z).softmax(-1), reduction="none"),
    "capped_from_below": lambda z: -3.0 * torch.tanh(z / 3.0),
    "words_in_two_dimensions": lambda z: z[..., torch.tensor([[1, 2], [3, 4]])],
    "words_by_mask": lambda z: z[..., [True] * (V - 1) + [False]],
    "true": lambda z: z[..., True] + z[:, None, True, :, 0, None, None],
    "topk": lambda z: z.topk(2, dim=-1).values,
    "words_in_front": lambda z: z.transpose(1, 2)[:, 1:],
    "cat": lambda z: torch.cat([z, z]),
    "numpy": lambda z: torch.from_numpy(z.detach().numpy()) + 0 * z.sum(),
    "out_of_place_mask": lambda z: z.masked_fill((LABELS == -100).unsqueeze(-1), 0.0),
    "permuted_by_name": lambda z: torch.permute(z, dims=(1, 0, 2)),
    "several_dims": lambda z: z[:1].movedim((0, 1), (1, 0)).squeeze((0, 1)),
    "source": lambda z: torch.zeros(B, T, V, dtype=z.dtype).scatter_(2, torch.zeros_like(z).long(), z),
    "two_targets": lambda z: F.cross_entropy(z[0], z[1].softmax(-1)),
    "lowered": lambda z: (z - torch.zeros_like(z).scatter_(-1, FULL.unsqueeze(-1), 2.5)).sum(-1),
}


def outcome(use, lazy: bool, strict: bool = False) -> tuple[Tensor, list[Tensor | None]]:
    linear, h = head(), hidden()
    if lazy:
        lazy_logits(nn.Sequential(), head=linear, strict=strict)
    found = use(linear(h))
    found = found.dense() if isinstance(found, LazyLogits) else found
    if not found.requires_grad:
        return found, []
    upstream = randn(*found.shape, dtype=torch.float64, seed=9)
    leaves = (h, linear.weight, linear.bias)
    return found, torch.autograd.grad(found, leaves, upstream, allow_unused=True)


@pytest.mark.parametrize("name", FOLDED)
def test_folds(name):
    ours, expected = outcome(FOLDED[name], lazy=True, strict=True), outcome(FOLDED[name], lazy=False)
    if name == "detach":
        expected = expected[0], []
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(ours[1], expected[1], strict=True):
        zero = torch.zeros((), dtype=torch.float64)
        torch.testing.assert_close(
            zero if mine is None else mine,
            zero.expand_as(mine) if theirs is None else theirs,
            rtol=1e-9,
            atol=1e-11,
        )


@pytest.mark.parametrize(
    "use",
    [
        lambda z: z.log_softmax(-1, torch.float32),
        lambda z: torch.softmax(z, -1, torch.float32),
        lambda z: F.softmax(z, -1, 3, torch.float32),
        lambda z: F.log_softmax(z, dim=-1, dtype=torch.float32),
    ],
)
def test_softmaxes_in_another_dtype(use):
    ours, expected = use(made()), use(head()(hidden()))
    assert ours.dtype == ours.dense().dtype == expected.dtype == torch.float32
    torch.testing.assert_close(ours.dense(), expected)


@pytest.mark.parametrize("name", MADE)
def test_whatever_else_makes_the_tensor(name):
    ours, expected = outcome(MADE[name], lazy=True), outcome(MADE[name], lazy=False)
    for mine, theirs in zip((ours[0], *ours[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    if name != "two_targets":
        with pytest.raises(
            RuntimeError, match=r"strict=True.*needs (logits|log_probs|probs|one_hot) of shape"
        ):
            outcome(MADE[name], lazy=True, strict=True)


def test_metadata_needs_nothing():
    z = made(strict=True)
    plain = head()(hidden())
    assert isinstance(z, Tensor)
    assert z.shape == plain.shape == z.size()
    assert (z.dim(), z.numel(), z.dtype, z.device, z.stride()) == (
        3,
        B * T * V,
        *(plain.dtype, plain.device),
        plain.stride(),
    )
    assert z.requires_grad
    assert z.is_floating_point()
    assert len(z) == B
    assert z.size(-1) == V
    assert z.mT.shape == (B, V, T)
    assert "LazyLogits(logits, shape=(2, 5, 7)" in repr(z)
    with pytest.raises(RuntimeError, match="register_hook: lazy logits never have a gradient"):
        z.register_hook(print)


def test_strict_says_what_to_do():
    with pytest.raises(
        RuntimeError, match=r"sum needs logits of shape \(2, 5, 7\) in memory.*call .dense\(\)"
    ):
        made(strict=True).sum()
    z = made(strict=True)
    z.dense()
    assert z.sum().isfinite()  # it is there already


def test_copies_and_files(tmp_path):
    with torch.no_grad():
        z = made()
    assert not z.requires_grad
    assert not z.dense().requires_grad
    for twin in (copy.deepcopy(z), pickle.loads(pickle.dumps(z))):
        torch.testing.assert_close(torch.as_tensor(twin), z.dense())
    torch.save(z, tmp_path / "logits.pt")
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), z.dense())


def test_the_tensor_is_made_once_and_with_its_history():
    z = made()
    with torch.no_grad():
        first = z.dense()
    assert first.requires_grad
    assert z.dense() is first


def test_what_comes_from_below_python():
    z = made()
    with torch._C.DisableTorchFunctionSubclass():
        total = torch.ops.aten.sum.default(z)
    expected = head()(hidden()).sum()
    torch.testing.assert_close(total, expected)
    assert total.requires_grad


def test_labels_out_of_range_raise():
    with pytest.raises(ValueError, match="labels"):
        F.cross_entropy(made()[0], torch.full((T,), V), reduction="none")


@pytest.mark.parametrize(
    ("use", "got"),
    [
        (lambda z: z[..., V], V),
        (lambda z: z[..., -V - 1], -V - 1),
        (lambda z: z[[0], [1], [2 * V]], 2 * V),
        (lambda z: z.softmax(-1)[..., [0, V]], V),
        (lambda z: z.gather(-1, torch.full((B, T, 1), -100)), -100),
        (lambda z: z.log_softmax(-1).gather(-1, torch.full((B, T, 1), V)), V),
        (lambda z: z.detach().scatter(-1, torch.full((B, T, 1), -1), -torch.inf), -1),
        (lambda z: torch.zeros_like(z).scatter_(-1, torch.full((B, T, 1), V), 1.0), V),
    ],
)
def test_words_outside_the_vocabulary_raise(use, got):
    with pytest.raises((IndexError, RuntimeError)):
        use(head()(hidden()))
    with pytest.raises(IndexError, match=rf"words of lazy logits must be in \[.*, {V}\), got {got}"):
        use(made())


def test_no_rows():
    z = made()[:, :0]
    assert F.cross_entropy(z.reshape(-1, V), torch.empty(0, dtype=torch.long), reduction="sum") == 0
    assert z.view(-1, V).shape == (0, V)
    assert F.cross_entropy(z.mT, LABELS[:, :0]).isnan()


def test_other_dtypes_of_hidden_states_are_refused():
    linear = head()
    lazy_logits(nn.Sequential(), head=linear)
    with pytest.raises(
        ValueError, match=r"hidden states must have the head's dtype, torch.float64, got torch.float32"
    ):
        linear(hidden().float())


def test_gradients_of_handles_are_refused():
    z = made()
    for use in (
        lambda: torch.autograd.grad(F.cross_entropy(z.mT, LABELS), z, allow_unused=True),
        lambda: torch.autograd.grad(z.sum(), [z]),
        lambda: z.requires_grad_(),
    ):
        with pytest.raises(RuntimeError, match=r"lazy logits never have a gradient; use that of .dense"):
            use()
    whole = z.dense()
    (found,) = torch.autograd.grad(F.cross_entropy(whole.mT, LABELS), whole)
    assert found.shape == z.shape
    h = hidden()
    (found,) = torch.autograd.grad(made(h=h), h, torch.ones(B, T, V, dtype=torch.float64))
    torch.testing.assert_close(found, head().weight.sum(0).expand(B, T, D))


def test_a_detached_handle_stays_detached():
    with torch.no_grad():
        constant = made().detach()
    assert not constant.requires_grad
    assert not constant[:, 1:].logsumexp(-1).requires_grad

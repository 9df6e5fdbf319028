"""Names of open-unlearning, in a package of stubs: what is rebound, what comes back, what the numbers are."""

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from unlearn_adapters import open_unlearning
from unlearn_kernels.token_loss import LazyLogits, lazy_logits

transformers = pytest.importorskip("transformers")

STUBS = {
    "trainer/__init__.py": "",
    "trainer/utils.py": """
import torch
from torch.nn import functional as F

def compute_batch_nll(model, inputs):
    outputs = model(**inputs)
    rows = outputs.logits[..., :-1, :].transpose(1, 2)
    return F.cross_entropy(rows, inputs["labels"][..., 1:], reduction="none").sum(-1), outputs

def compute_dpo_loss(model, ref_model, win_inputs=None, lose_inputs=None, beta=1.0):
    n, outputs = compute_batch_nll(model, lose_inputs)
    with torch.no_grad():
        r, _ = compute_batch_nll(ref_model, lose_inputs)
    return -2 / beta * F.logsigmoid(beta * (n - r)).mean(), (None, outputs)

def compute_kl_divergence(model, target_model, inputs):
    with torch.no_grad():
        there = F.log_softmax(target_model(**inputs).logits, dim=-1)
    outputs = model(**inputs)
    here = F.log_softmax(outputs.logits, dim=-1)
    return F.kl_div(here, there, reduction="batchmean", log_target=True), outputs

def compute_undial_loss(model, ref_model, inputs, beta): ...
def compute_wga_loss(model, inputs, beta): ...
def compute_satimp_loss(model, inputs, beta1, beta2): ...
""",
    "trainer/unlearn/__init__.py": "",
    "trainer/unlearn/base.py": """
class Trainer:
    def training_step(self, model, inputs):
        loss = self.compute_loss(model, inputs)
        loss.backward()
        return loss.detach()

class UnlearnTrainer(Trainer):
    ref_model = None
""",
    "trainer/unlearn/npo.py": """
from trainer.utils import compute_dpo_loss
from trainer.unlearn.base import UnlearnTrainer

class NPO(UnlearnTrainer):
    def compute_loss(self, model, inputs):
        return compute_dpo_loss(model=model, ref_model=self.ref_model, lose_inputs=inputs["forget"], beta=0.1)[0]

class GradDiff(UnlearnTrainer):
    def compute_loss(self, model, inputs):
        self.seen = model(**inputs["forget"])
        return model(**inputs["retain"]).loss - self.seen.loss
""",
    "trainer/unlearn/rmu.py": """
import torch
class RMU:
    def forward_with_cache(self, model, inputs, module, no_grad=True):
        cache = []
        handle = module.register_forward_hook(lambda m, i, o: cache.append(o[0] if isinstance(o, tuple) else o))
        with torch.set_grad_enabled(not no_grad):
            outputs = model(**inputs)
        handle.remove()
        return cache[0], outputs
""",
    "evals/__init__.py": "",
    "evals/metrics/__init__.py": "",
    "evals/metrics/utils.py": """
import torch
from torch.nn import functional as F

def evaluate_probability(model, batch):
    with torch.no_grad():
        logits = model(**batch).logits
    return F.cross_entropy(logits[..., :-1, :].transpose(-1, -2), batch["labels"][..., 1:], reduction="none").sum(-1)

def tokenwise_logprobs(model, batch, grad=False):
    with torch.set_grad_enabled(grad):
        logits = model(**batch).logits
    assert isinstance(logits, torch.Tensor)
    return logits

def tokenwise_vocab_logprobs(model, batch, grad=False):
    with torch.set_grad_enabled(grad):
        logits = model(**batch).logits
    return [rows for rows in F.log_softmax(logits, dim=-1)[:, :-1, :]]
""",
    "evals/metrics/memorization.py": """
from evals.metrics.utils import evaluate_probability, tokenwise_vocab_logprobs

def exact_memorization(model, batch):
    pairs = zip(tokenwise_vocab_logprobs(model, batch), batch["labels"][:, 1:])
    return [(rows.argmax(dim=-1) == labels).float().mean() for rows, labels in pairs]
""",
}


@pytest.fixture
def peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, text in STUBS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    roots = ("trainer", "evals")
    assert not any(name.split(".")[0] in roots for name in sys.modules)
    yield importlib.import_module
    open_unlearning.uninstall()
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        del sys.modules[name]


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 61}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**shape, num_hidden_layers=4, pad_token_id=0)
    )


def texts(seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": torch.where(torch.arange(9) < 3, -100, ids)}


def stepped(trainer, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = trainer.training_step(model, {"forget": texts(0), "retain": texts(1)})
    return loss, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_trainers_and_evaluations_run_as_before(peer):
    npo, memorization, utils = map(
        peer, ("trainer.unlearn.npo", "evals.metrics.memorization", "trainer.utils")
    )
    model, reference = make(), make(1).requires_grad_(False)

    def numbers() -> list[torch.Tensor]:
        found = []
        for kind in (npo.NPO, npo.GradDiff):
            trainer = kind()
            trainer.ref_model = reference
            found += stepped(trainer, model)
        found.append(utils.compute_kl_divergence(model, reference, texts(2))[0].detach())
        found.append(torch.stack(memorization.exact_memorization(model, texts(0))))
        found.append(memorization.evaluate_probability(model, texts(0)))
        return found

    before = numbers()
    with open_unlearning.installed():
        open_unlearning.install()
        during = numbers()
    after = numbers()
    for first, second, third in zip(before, during, after, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-5, atol=1e-6)
        assert torch.equal(third, first)


def test_models_are_lazy_while_its_code_runs_and_only_then(peer):
    npo, utils, base = map(peer, ("trainer.unlearn.npo", "trainer.utils", "trainer.unlearn.base"))
    metrics, memorization = peer("evals.metrics.utils"), peer("evals.metrics.memorization")
    model, theirs = make(), utils.compute_dpo_loss
    open_unlearning.install()
    assert npo.compute_dpo_loss is utils.compute_dpo_loss is not theirs
    assert memorization.evaluate_probability is metrics.evaluate_probability
    _, (_, outputs) = utils.compute_dpo_loss(model, model, lose_inputs=texts(0))
    assert isinstance(outputs.logits, LazyLogits)
    trainer = npo.GradDiff()
    stepped(trainer, model)
    assert isinstance(trainer.seen.logits, LazyLogits)
    assert type(model(**texts(0)).logits) is torch.Tensor
    assert type(metrics.tokenwise_logprobs(model, texts(0), grad=True)) is torch.Tensor
    assert isinstance(metrics.tokenwise_logprobs(model, texts(0)), LazyLogits)
    open_unlearning.uninstall()
    assert npo.compute_dpo_loss is utils.compute_dpo_loss is theirs
    assert "training_step" not in vars(base.UnlearnTrainer)


def test_a_model_that_is_lazy_already_stays_so(peer):
    utils, model = peer("trainer.utils"), make()
    with open_unlearning.installed(), lazy_logits(model):
        utils.compute_batch_nll(model, texts(0))
        assert isinstance(model(**texts(0)).logits, LazyLogits)


def test_rmu_leaves_early(peer):
    rmu, model, reached = peer("trainer.unlearn.rmu").RMU(), make(), []
    layer = model.model.layers[1]
    expected, _ = rmu.forward_with_cache(model, texts(0), layer, no_grad=False)
    model.model.layers[2].register_forward_hook(lambda *_: reached.append(2))
    with open_unlearning.installed():
        found, _ = rmu.forward_with_cache(model, texts(0), layer, no_grad=False)
        nothing, _ = rmu.forward_with_cache(model, texts(0), module=layer)
    assert torch.equal(found, expected)
    assert found.requires_grad
    assert not nothing.requires_grad
    assert reached == []


def test_a_fork_without_some_of_it(peer):
    utils, metrics, base = map(peer, ("trainer.utils", "evals.metrics.utils", "trainer.unlearn.base"))
    del metrics.tokenwise_logprobs, utils.compute_wga_loss, peer("trainer.unlearn.rmu").RMU.forward_with_cache
    before = metrics.evaluate_probability, utils.compute_dpo_loss
    with open_unlearning.installed():
        assert metrics.evaluate_probability is not before[0]
        assert utils.compute_dpo_loss is not before[1]
        assert "training_step" in vars(base.UnlearnTrainer)
        assert not hasattr(metrics, "tokenwise_logprobs")
    assert (metrics.evaluate_probability, utils.compute_dpo_loss) == before
    assert "training_step" not in vars(base.UnlearnTrainer)


def test_a_failure_half_way_leaves_everything_as_it_was(peer):
    utils, metrics = peer("trainer.utils"), peer("evals.metrics.utils")
    before = dict(vars(utils))
    metrics.evaluate_probability = 3
    for _ in range(2):
        with pytest.raises(TypeError, match="3 is not a callable object"):
            open_unlearning.install()
        assert vars(utils) == before
        assert open_unlearning._before == []


def test_another_package_of_that_name_is_refused(peer):
    utils = peer("trainer.utils")
    for name in open_unlearning.FUNCTIONS["trainer.utils"]:
        delattr(utils, name)
    with pytest.raises(
        ImportError, match=r"trainer\.utils is not open-unlearning's: it has none of compute_kl"
    ):
        open_unlearning.install()


def test_without_it_there_is_nothing_to_install():
    if "trainer" in sys.modules:
        pytest.skip("another test's package of that name")
    with pytest.raises(ModuleNotFoundError, match="trainer"):
        open_unlearning.install()
    assert copy.copy(open_unlearning._before) == []

"""Loss functions as training code has them, through `lazy_logits`: their numbers, and no logits."""

import copy
from contextlib import nullcontext
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.token_loss.peers import LENGTH, LOSSES, WORDS, batch, npo
from unlearn_kernels.testing import assert_as_exact_as
from unlearn_kernels.token_loss import LazyLogits, lazy_logits

transformers = pytest.importorskip("transformers")

SHAPE = {
    "vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS = {
    "Llama": SHAPE | {"num_key_value_heads": 1},
    "Qwen2": SHAPE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "GPT2": {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32} | QUIET,
    "Gemma2": SHAPE | {
        "num_key_value_heads": 1, "head_dim": 8, "final_logit_softcapping": 3.0, "attn_implementation": "eager",
    },
    "Phi": SHAPE | {"resid_pdrop": 0.0, "embd_pdrop": 0.0},
}  # fmt: skip


def make(kind: str = "Llama", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    causal = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    model = getattr(transformers, causal)(getattr(transformers, f"{kind}Config")(**MODELS[kind]))
    for p in model.parameters():
        p.data.normal_(0, 0.2 + 0.3 * seed)  # a reference far away
    return model


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def step(loss, model: nn.Module, reference: nn.Module, watch=None) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    with watch or nullcontext():
        value = loss(model, reference, batch(0), batch(1))
        value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Largest(TorchDispatchMode):
    """The largest tensor that any operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if type(x) is Tensor and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return found


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_of_a_byte(weighted):
    head = nn.Linear(5, 200)
    h, labels = torch.randn(7, 5), torch.tensor([156, 3, 7, 156, 0, 199, 1])
    weight = torch.rand(200) if weighted else None
    with lazy_logits(nn.Sequential(), head=head):
        logits = head(h)
    eager = F.cross_entropy(head(h), labels, weight)
    torch.testing.assert_close(F.cross_entropy(logits, labels.to(torch.uint8), weight), eager)
    found, expected = (F.nll_loss(z.softmax(-1), y) for z, y in ((logits, labels.byte()), (head(h), labels)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", MODELS)
def test_peers_losses_are_eager_ones_without_logits(kind):
    model, reference = make(kind), frozen(make(kind, 1))
    double, double_reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    for name, loss in LOSSES.items():
        exact, eager = step(loss, double, double_reference), step(loss, model, reference)
        with lazy_logits(model, strict=True), lazy_logits(reference, strict=True):
            ours = step(loss, model, reference, largest := Largest())
        assert_as_exact_as(name, ours[0], exact[0], eager[0], floor=1e-6)
        assert_as_exact_as(f"gradient of {name}", ours[1], exact[1], eager[1], floor=1e-5)
        assert largest.numel < 3 * (LENGTH - 1) * WORDS / 2, name
    step(npo, model, reference, largest := Largest())
    assert largest.numel >= 3 * LENGTH * WORDS  # what the bound above tells apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    model, reference = make().to(dtype), frozen(make(seed=1)).to(dtype)
    exact = step(npo, copy.deepcopy(model).double(), copy.deepcopy(reference).double())
    eager = step(npo, model, reference)
    with lazy_logits(model, strict=True), lazy_logits(reference, strict=True):
        ours = step(npo, model, reference)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[1].dtype == dtype
    for name, *values in zip(("value", "gradient"), ours, exact, eager, strict=True):
        assert_as_exact_as(name, *values)


def test_a_reference_that_is_not_frozen_is_a_constant():
    for name in ("kl", "undial"):
        model, reference = make(), make(seed=1)
        eager = step(LOSSES[name], model, reference)
        with lazy_logits(model, strict=True), lazy_logits(reference, strict=True):
            ours = step(LOSSES[name], model, reference)
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
        assert reference.lm_head.weight.grad is None


def test_frozen_head():
    model, reference = make(), frozen(make(seed=1))
    model.lm_head.requires_grad_(False)
    eager = step(npo, model, reference)
    with lazy_logits(model, strict=True), lazy_logits(reference, strict=True):
        ours = step(npo, model, reference)
    for actual, expected in zip(ours, eager, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_nobody_reads_is_never_computed(monkeypatch):
    from unlearn_kernels.token_loss.lazy import deferred

    model, calls = make(), []
    monkeypatch.setattr(deferred, "nll", lambda *a: calls.append(a) or torch.zeros(()))
    with lazy_logits(model, strict=True):
        outputs = model(**batch(0))
        assert outputs.loss.shape == ()
        assert outputs.loss.requires_grad
        assert not calls
        assert outputs.loss + 1 == 1
        assert float(outputs.loss) == 0
    assert len(calls) == 1


def test_the_loss_of_a_model_reaches_autograd_by_any_way():
    model, inputs = make(), batch(0)
    model(**inputs).loss.backward()
    expected = model.lm_head.weight.grad.clone()
    for use in (
        lambda loss: loss.backward(),
        torch.autograd.backward,
        lambda loss: torch.autograd.backward([loss]),
        lambda loss: (2 * loss - loss.clone()).backward(),
    ):
        model.zero_grad()
        with lazy_logits(model, strict=True):
            use(model(**inputs).loss)
        torch.testing.assert_close(model.lm_head.weight.grad, expected)
    with lazy_logits(model, strict=True):
        (found,) = torch.autograd.grad(model(**inputs).loss, model.lm_head.weight)
    torch.testing.assert_close(found, expected)


def test_generation_is_the_models(recwarn):
    model, ids = make(), batch(0)["input_ids"]
    options = [
        {}, {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3}, {"num_beams": 2}, {"bad_words_ids": [[3]]},
    ]  # fmt: skip
    for more in options:
        torch.manual_seed(0)
        expected = model.generate(ids, max_new_tokens=4, **more)
        torch.manual_seed(0)
        with lazy_logits(model, strict=True):
            assert torch.equal(model.generate(ids, max_new_tokens=4, **more), expected)


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*unused parameters")
@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
def test_ddp(one_process, options):
    model, reference = make(), frozen(make(seed=1))
    expected = {name: step(LOSSES[name], model, reference) for name in ("npo", "grad_diff")}
    for name, (value, gradient) in expected.items():
        if name == "grad_diff" and options:
            continue  # two forwards before a backward are refused with or without lazy logits
        parallel = DistributedDataParallel(copy.deepcopy(model), **options)
        with lazy_logits(parallel, strict=True), lazy_logits(reference, strict=True):
            for _ in range(2):  # a static graph's second step is another
                found = step(LOSSES[name], parallel, reference)
        torch.testing.assert_close(found[0], value, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[1], gradient, rtol=1e-4, atol=1e-6)


def test_fsdp(one_process):
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    model, reference = make(), frozen(make(seed=1))
    value, gradient = step(npo, model, reference)
    for keeps in (True, False):
        sharded = copy.deepcopy(model)
        for layer in sharded.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh, reshard_after_forward=not keeps)
        with lazy_logits(sharded, strict=True), lazy_logits(reference, strict=True):
            if not keeps:
                with pytest.raises(RuntimeError, match="reshard_after_forward=False"):
                    npo(sharded, reference, batch(0), batch(1))
                continue
            loss = npo(sharded, reference, batch(0), batch(1))
            loss.backward()
        torch.testing.assert_close(loss.detach(), value, rtol=1e-6, atol=0)
        found = torch.cat([p.grad.full_tensor().flatten() for p in sharded.parameters()])
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
    apart = copy.deepcopy(model)
    fully_shard(apart.lm_head, mesh=mesh)
    with pytest.raises(ValueError, match="must not be sharded on its own"):
        lazy_logits(apart)


def test_compiled_body():
    model, reference = make(), frozen(make(seed=1))
    expected = step(npo, model, reference)
    model.model.compile(backend="aot_eager")
    with lazy_logits(model, strict=True), lazy_logits(reference, strict=True):
        ours = step(npo, model, reference)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-6)


def test_compiled_whole_has_plain_logits():
    model, inputs = make(), batch(0)
    expected = model(**inputs).logits
    with lazy_logits(model, strict=True):
        logits = torch.compile(model, backend="aot_eager")(**inputs).logits
        assert isinstance(model(**inputs).logits, LazyLogits)
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, expected)


def test_autocast_and_accelerates_conversion():
    operations = pytest.importorskip("accelerate.utils.operations")
    model, inputs = make(), batch(0)
    eager, exact = step(npo, model, frozen(make(seed=1))), model(**inputs).logits
    with lazy_logits(model, strict=True), torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
        assert logits.dtype == torch.bfloat16
        assert torch.nn.functional.cross_entropy(logits[0], inputs["labels"][0]).dtype == torch.float32
    model.forward = MethodType(operations.convert_outputs_to_fp32(type(model).forward), model)
    with lazy_logits(model, strict=True), torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
    assert isinstance(outputs.logits, LazyLogits)
    assert outputs.logits.dtype == torch.float32
    torch.testing.assert_close(outputs.logits.dense(), exact, rtol=0.1, atol=0.1)
    with lazy_logits(model, strict=True):
        ours = step(npo, model, frozen(make(seed=1)))
    torch.testing.assert_close(ours[1], eager[1], rtol=1e-4, atol=1e-6)


def test_attaching_and_detaching():
    model, inputs = make(), batch(0)
    plain = type(model.lm_head)
    held = lazy_logits(model)
    twin = copy.deepcopy(model)
    assert isinstance(twin(**inputs).logits, LazyLogits)
    assert twin.state_dict().keys() == model.state_dict().keys() == make().state_dict().keys()
    with lazy_logits(model, strict=True), pytest.raises(RuntimeError, match="strict"):
        model(**inputs).logits.sum()
    assert model(**inputs).logits.sum().isfinite()
    held.restore()
    held.restore()
    assert type(model.lm_head) is plain
    assert type(model(**inputs).logits) is Tensor
    assert "lazy_uses" not in vars(model.lm_head)


def test_contexts_end_in_any_order_and_for_copies():
    model, inputs = make(), batch(0)
    plain, first = type(model.lm_head), lazy_logits(model)
    with lazy_logits(model, strict=True) as second:
        first.restore()
        twin = copy.deepcopy(model)
        assert isinstance(twin(**inputs).logits, LazyLogits)
        with pytest.raises(RuntimeError, match="strict"):
            model(**inputs).logits.sum()
    assert type(model.lm_head) is plain
    assert type(twin(**inputs).logits) is Tensor
    second.restore()
    with lazy_logits(twin):
        assert isinstance(twin(**inputs).logits, LazyLogits)
    assert type(twin.lm_head) is plain


def test_without_gradients_only_a_models_own_loss_waits(monkeypatch):
    from unlearn_kernels.token_loss.lazy import deferred

    model, inputs, calls = make(), batch(0), []
    monkeypatch.setattr(deferred, "nll", lambda *a: calls.append(a) or torch.zeros(()))
    with lazy_logits(model, strict=True), torch.no_grad():
        outputs = model(**inputs)
        before = torch.nn.functional.cross_entropy(outputs.logits.mT, inputs["labels"])
        model.lm_head.weight.mul_(2)
        assert type(before) is Tensor
        assert before.isfinite()
        assert not calls
        with pytest.raises(RuntimeError, match="the head's weight changed in place"):
            outputs.loss.item()


def test_transforms_have_plain_logits():
    model, inputs = make(), batch(0)

    def loss(weight):
        outputs = torch.func.functional_call(model, {"lm_head.weight": weight}, kwargs=inputs)
        return outputs.logits.logsumexp(-1).sum() + outputs.loss

    weight = model.lm_head.weight.detach()
    expected = torch.func.grad(loss)(weight)
    with lazy_logits(model, strict=True):
        torch.testing.assert_close(torch.func.grad(loss)(weight), expected)
        outputs = model(**inputs)
    with pytest.raises(RuntimeError, match=r"cannot enter a transform of torch.func"):
        torch.func.grad(lambda x: x * outputs.logits.logsumexp(-1).sum())(torch.ones(()))


def test_what_cannot_be_lazy_is_refused():
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\) with a head, .*, got Sequential"):
        lazy_logits(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"get_output_embeddings\(\) with a head, .*, got LlamaModel"):
        lazy_logits(make().model)
    with pytest.raises(ValueError, match=r"the head must be an nn.Linear, got Bilinear"):
        lazy_logits(nn.Sequential(), head=nn.Bilinear(1, 2, 3))
    model = make()
    model.lm_head.forward = lambda h: h
    with pytest.raises(ValueError, match="the head's forward must be its class's"):
        lazy_logits(model)


def test_adapters_on_a_body():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model, reference = peft.get_peft_model(make(), config), frozen(make(seed=1))
    expected = step(npo, model, reference)
    with lazy_logits(model, strict=True), lazy_logits(reference, strict=True):
        ours = step(npo, model, reference)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-6)
    headed = peft.get_peft_model(make(), peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="leave it out of adapters"):
        lazy_logits(headed)

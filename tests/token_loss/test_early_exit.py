"""RMU's activations without the layers above: the same bits, and the same gradients."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unlearn_kernels.token_loss import early_exit

transformers = pytest.importorskip("transformers")

LAYERS, HOOK = 32, 7
IDS = torch.arange(18).reshape(2, 9)


def make(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 31}
    config = transformers.LlamaConfig(**shape, num_hidden_layers=layers, pad_token_id=0)
    return transformers.LlamaForCausalLM(config)


def cached(model: nn.Module, layer: nn.Module, called: nn.Module | None = None):
    """As open-unlearning and WMDP have it: a hook that keeps the layer's output, and a whole forward."""
    kept = []
    handle = layer.register_forward_hook(lambda m, i, o: kept.append(o[0] if isinstance(o, tuple) else o))
    outputs = (called or model)(input_ids=IDS, labels=IDS)
    handle.remove()
    return kept[0], outputs


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_activations_and_gradients_are_bit_identical():
    model, reached = make(), []
    layer = model.model.layers[HOOK]
    whole, _ = cached(model, layer)
    whole.square().sum().backward()
    expected = gradients(model)
    for number, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda *_, n=number: reached.append(n))
    for name in (layer, f"model.layers.{HOOK}", HOOK, HOOK - LAYERS):
        reached.clear()
        with early_exit(model, name):
            activations, outputs = cached(model, layer)
        assert reached == list(range(HOOK + 1))
        assert torch.equal(activations, whole)
        assert outputs.hidden is activations
        activations.square().sum().backward()
        found = gradients(model)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
    with pytest.raises(AttributeError, match="there is no logits, only hidden"):
        _ = outputs.logits


def test_frozen_layers_below_have_no_graph():
    model = make(12)
    model.requires_grad_(False)
    for layer in model.model.layers[5:8]:
        layer.mlp.down_proj.weight.requires_grad_()
    lower = cached_early(model, model.model.layers[4])
    assert not lower.requires_grad
    few = saved(model)
    assert len(gradients(model)) == 3
    assert few * 2 < saved(model.requires_grad_(True))


def cached_early(model: nn.Module, layer: nn.Module) -> torch.Tensor:
    with early_exit(model, 7):
        return cached(model, layer)[0]


def saved(model: nn.Module) -> int:
    """How many tensors are kept for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(0) or x, lambda x: x):
        cached_early(model, model.model.layers[7]).sum().backward()
    return len(kept)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    model = make(8).train()
    model.requires_grad_(True)
    model(IDS, output_hidden_states=True).hidden_states[4].square().sum().backward()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    with early_exit(model, 3):
        hidden = model(IDS, use_cache=False).hidden
        hidden.square().sum().backward()
    found = gradients(model)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key])


def test_the_model_is_as_before():
    model = make(2)
    expected = model(IDS).logits
    with pytest.raises(KeyError), early_exit(model, 0):
        raise KeyError
    assert "forward" not in vars(model)
    assert not model.model.layers[0]._forward_hooks
    assert torch.equal(model(IDS).logits, expected)
    own = model.forward
    model.forward = own
    with early_exit(model, 0), early_exit(model, 1):
        assert model(IDS).hidden.shape == (2, 9, 16)
    assert vars(model)["forward"] is own


def test_what_is_no_layer_is_refused():
    for layer, got in (("model.layers.9", "'model.layers.9'"), (2, "2"), (nn.Identity(), "Identity")):
        with (
            pytest.raises(ValueError, match=f"layer must be a module of the model, .*, got {got}"),
            early_exit(make(2), layer),
        ):
            pass


@pytest.mark.filterwarnings("ignore:.*unused parameters")
def test_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make(4)
        cached(model, model.model.layers[1])[0].sum().backward()
        expected = gradients(model)
        parallel = DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            with early_exit(parallel, 1):
                cached(model, model.model.layers[1], parallel)[0].sum().backward()
            found = {k: g for k, g in gradients(model).items() if g.any()}
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key])
    finally:
        torch.distributed.destroy_process_group()

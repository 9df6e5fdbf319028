"""Which modules of a model to follow, and which parameters of it are theirs."""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, TypeAlias

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unlearn_kernels.per_sample._parallel import is_dtensor
from unlearn_kernels.per_sample.modules.fallback import FallbackLayer
from unlearn_kernels.per_sample.modules.layer import Layer
from unlearn_kernels.per_sample.modules.recognise import recognise

Fallback: TypeAlias = Literal["vmap"] | None


class Followed(NamedTuple):
    """A layer, and the names under which the model knows its parameters."""

    layer: Layer
    names: dict[str, str]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s and `DistributedDataParallel`'s wrappers."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def survey(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], fallback: Fallback, parts: Collection[str]
) -> tuple[list[Followed], list[str]]:
    """Every module with followed parameters as a layer, and a sentence for each that cannot be one. Of the parameters
    in `parts` the process has a part only."""
    names = {id(p): name for name, p in parameters.items()}
    found: list[Followed] = []
    left: list[tuple[str, nn.Module, dict[str, str], str]] = []
    inside: nn.Module | None = None
    for path, module in model.named_modules():
        attention = isinstance(module, nn.MultiheadAttention)
        if inside is not None and any(module is m for m in inside.modules()) and not attention:
            continue
        inside = module if attention else None
        own = module.named_parameters(recurse=attention, remove_duplicate=False)
        mine = {attribute: names[id(p)] for attribute, p in own if id(p) in names}
        if not mine:
            continue
        maker = recognise(module)
        if isinstance(maker, str):
            left.append((path, module, mine, maker))
        else:
            found.append(Followed(maker(path, module, frozenset(mine)), mine))
    problems = _leftovers(found, left, parameters, fallback)
    for layer, mine in found:
        reason = layer.localise() if any(name in parts for name in mine.values()) else None
        if reason is not None:
            problems.append(f"{layer.path} ({type(layer.module).__name__}): {reason}")
    return found, problems


def _leftovers(
    found: list[Followed],
    left: list[tuple[str, nn.Module, dict[str, str], str]],
    parameters: Mapping[str, nn.Parameter],
    fallback: Fallback,
) -> list[str]:
    """Modules without a kernel: fallbacks added to `found`, or what is wrong. Parameters that a layer has are its."""
    taken = {name for _, mine in found for name in mine.values()}
    problems = []
    for path, module, mine, reason in left:
        open_ = {attribute: name for attribute, name in mine.items() if name not in taken}
        if not open_:
            continue
        if fallback == "vmap" and not any(is_dtensor(parameters[name]) for name in open_.values()):
            found.append(Followed(FallbackLayer(path, module, frozenset(open_)), open_))
            taken.update(open_.values())
        else:
            what = f"{path or 'the model itself'} ({type(module).__name__}; {', '.join(open_)})"
            problems.append(f"{what}: {reason}")
    return problems

"""open-unlearning on these kernels: its trainers and evaluations, unchanged, without logits in memory.

    from unlearn_adapters import open_unlearning
    open_unlearning.install()

before its trainer starts, in a process whose path has its `src`. Its own code runs, with every quirk; the models it
is given are under `unlearn_kernels.token_loss.lazy_logits` while it does, and RMU's forwards end at the hooked layer.

Source: github.com/locuslab/open-unlearning.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import ModuleType
from typing import Any, Final

from torch import nn

from unlearn_kernels.token_loss import early_exit, lazy_logits

# What takes models as arguments, by module.
FUNCTIONS: Final = {
    "trainer.utils": (
        "compute_kl_divergence", "compute_batch_nll", "compute_dpo_loss", "compute_undial_loss", "compute_wga_loss",
        "compute_satimp_loss",
    ),
    "trainer.unlearn.ceu": ("compute_batch_ceu",),
    "evals.metrics.utils": ("evaluate_probability", "tokenwise_logprobs", "tokenwise_vocab_logprobs"),
}  # fmt: skip
# Where a step has a model that only the trainer holds.
TRAINER: Final = ("trainer.unlearn.base", "UnlearnTrainer")
RMU: Final = ("trainer.unlearn.rmu", "RMU")

_before: list[tuple[Any, str, Any]] = []


@contextmanager
def lazy(*models: Any) -> Iterator[None]:
    """`lazy_logits` of every model among these."""
    with ExitStack() as stack:
        held: list[Any] = [model for model in models if isinstance(model, nn.Module)]
        for model in held:
            stack.enter_context(lazy_logits(model))
        yield


def lazily(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose models are lazy while it runs, unless it is called with `grad=True`.

    The GradNorm attack asks for the latter: `unlearn_adapters.gradnorm` takes gradients at the head itself.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        models = () if given.get("grad") else given.values()
        with lazy(*models):
            return function(*args, **kwargs)

    return call


def _lazy_step(step: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(step)
    def training_step(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with lazy(model, getattr(self, "ref_model", None)):
            return step(self, model, *args, **kwargs)

    return training_step


def _leaving_early(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def forward_with_cache(self: Any, model: nn.Module, inputs: Any, module: nn.Module, **kwargs: Any) -> Any:
        with early_exit(model, module):
            return forward(self, model, inputs, module, **kwargs)

    return forward_with_cache


def _replace(owner: Any, name: str, value: Any) -> None:
    _before.append((owner, name, vars(owner).get(name)))
    setattr(owner, name, value)


def _modules() -> list[ModuleType]:
    """Of open-unlearning, as far as they are imported."""
    roots = {name.split(".")[0] for name in FUNCTIONS}
    return [m for name, m in list(sys.modules.items()) if name.split(".")[0] in roots and m is not None]


def install() -> None:
    """Puts these kernels under open-unlearning's trainers and evaluations. A second call does nothing.

    Functions are replaced wherever a module has imported them by name: `trainer.utils`' losses, CEU's, and the
    likelihoods of `evals.metrics`. A training step of `UnlearnTrainer` makes its model and its reference lazy, so that
    GradAscent, GradDiff, PDU and trainers of your own need no more. `RMU.forward_with_cache` leaves the forward at
    the hooked layer. Parts of open-unlearning that cannot be imported, for want of what they import, are left out, and
    so is what a fork or an older version does not have.

    Raises:
        ModuleNotFoundError: if there is no `trainer.utils`: open-unlearning's `src` must be on the path.
        ImportError: if that module has none of the losses, and so is another package's.
    """
    if _before:
        return
    names = FUNCTIONS["trainer.utils"]
    if not any(hasattr(importlib.import_module("trainer.utils"), name) for name in names):
        raise ImportError(f"trainer.utils is not open-unlearning's: it has none of {', '.join(names)}")
    try:
        _replace_all()
    except BaseException:
        uninstall()
        raise


def _replace_all() -> None:
    for module, names in FUNCTIONS.items():
        home = vars(_imported(module) or ModuleType(module))
        for name in names:
            if name in home:
                _rebind(home[name], name)
    for where, name, wrapped in (
        (TRAINER, "training_step", _lazy_step),
        (RMU, "forward_with_cache", _leaving_early),
    ):
        owner = _class(*where)
        if hasattr(owner, name):
            _replace(owner, name, wrapped(getattr(owner, name)))


def _rebind(function: Callable[..., Any], name: str) -> None:
    replacement = lazily(function)
    for module in _modules():
        if vars(module).get(name) is function:
            _replace(module, name, replacement)


def _imported(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def _class(module: str, name: str) -> Any:
    return getattr(_imported(module), name, None)


def uninstall() -> None:
    """Puts back what `install` replaced."""
    while _before:
        owner, name, value = _before.pop()
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


@contextmanager
def installed() -> Iterator[None]:
    """`install` for a while."""
    install()
    try:
        yield
    finally:
        uninstall()

"""What the families share when they register operators: reasons, entry points, fakes."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, Final

import torch

from unlearn_kernels import _loader
from unlearn_kernels._backends import FLOATS, Impl, Operator, register

NAMESPACE: Final = "unlearn_kernels"


# Looked up once and without importing it: `torch.compile` cannot trace the search.
_HAVE_TRITON: Final = importlib.util.find_spec("triton") is not None


def no_extension() -> str | None:
    """Why the C++ kernels cannot run, or None."""
    return None if _loader.have_C else f"the C++ extension is missing ({_loader.load_errors['_C']})"


def _no_triton() -> str | None:
    if not _HAVE_TRITON:
        return "Triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "it needs a CUDA device"
    return None


def no_triton_kernels() -> str | None:
    """Why the Triton kernels cannot run, or None."""
    return no_extension() or _no_triton()


def no_cuda_kernels() -> str | None:
    """Why the CUDA C++ kernels cannot run, or None."""
    if no_extension():
        return no_extension()
    if not _loader.have_C_cuda:
        return f"the CUDA extension is missing ({_loader.load_errors['_C_cuda']})"
    return None if torch.cuda.is_available() else "it needs a CUDA device"


def raw(name: str) -> Callable[..., Any]:
    """`torch.ops.unlearn_kernels.<name>`, or a function that says how to build it."""
    if _loader.have_C:
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def missing(*_: Any) -> Any:
        raise ImportError(no_extension())

    return missing


def register_operator(
    name: str,
    family: str,
    formula: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None,
    triton: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    differentiable: bool = False,
    op: str | None = None,
) -> Operator:
    """Registers one operator under all of its backends.

    Args:
        name: the operator's name in the registry.
        family: the module that it belongs to.
        formula: one line of text for the operator table.
        reference: plain PyTorch, with the arguments of the raw operator.
        fake: the shapes and dtypes of its result (None for an operator that returns nothing).
        triton: its launcher; bound as the CUDA kernel of the raw operator. Imports Triton when called.
        cuda: the launcher of its CUDA C++ kernels; bound as the operator `cuda_<op>`.
        dtypes: the floating-point types that the kernels take.
        differentiable: whether the public function has a backward.
        op: the raw operator, if its name differs.
    """
    op = op or name
    impls = {
        "cpp": Impl("cpp", raw(op), ("cpu",), dtypes, no_extension),
        "reference": Impl("reference", reference, ("cpu", "cuda")),
    }
    if triton is not None:
        impls["triton"] = Impl("triton", raw(op), ("cuda",), dtypes, no_triton_kernels)
    if _loader.have_C:
        register_raw(op, fake, triton)
        if cuda is not None:
            _define_like(op, f"cuda_{op}")
            register_raw(f"cuda_{op}", fake, cuda)
    if cuda is not None:
        impls["cuda"] = Impl("cuda", raw(f"cuda_{op}"), ("cuda",), dtypes, no_cuda_kernels)
    return register(Operator(name, family, formula, impls, differentiable))


def launcher(module: str, name: str, package: str = "triton_kernels") -> Callable[..., Any]:
    """`unlearn_kernels.<package>.<module>.<name>`, imported when it is called."""

    def launch(*args: Any) -> Any:
        found = importlib.import_module(f"unlearn_kernels.{package}.{module}")
        return getattr(found, name)(*args)

    return launch


def _define_like(op: str, name: str) -> None:
    """An operator with the arguments of another, which writes to the same."""
    schema = str(getattr(getattr(torch.ops, NAMESPACE), op).default._schema)
    torch.library.define(f"{NAMESPACE}::{name}", schema[schema.index("(") :])


# The launcher of each raw operator on CUDA tensors, for those who run launchers without a GPU.
LAUNCHERS: Final[dict[str, Callable[..., Any]]] = {}


def register_raw(op: str, fake: Callable[..., Any] | None, cuda: Callable[..., Any] | None) -> None:
    """Gives a raw operator its fake and its CUDA kernel. The dispatcher keeps one kernel a key: bound here only."""
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake or (lambda *args: None))
    if cuda is not None:
        torch.library.impl(f"{NAMESPACE}::{op}", "CUDA")(cuda)
        LAUNCHERS[op] = cuda

"""Names under which torch functions and methods arrive, by what a lazy tensor does with them."""

from collections.abc import Callable
from typing import Any, Final

# What is known without logits.
_METHODS: Final = {
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "element_size", "get_device"),
    *("is_floating_point", "is_complex", "is_signed", "is_inference", "is_same_size", "__len__", "__hash__"),
    *("data_ptr", "untyped_storage"),  # raise: there is none
}  # fmt: skip
_PROPERTIES: Final = {
    *("shape", "dtype", "device", "layout", "ndim", "names", "itemsize", "nbytes", "is_leaf", "is_cpu", "is_cuda"),
    *("is_meta", "is_mps", "is_xpu", "is_sparse", "is_mkldnn", "is_vulkan", "is_nested", "is_quantized"),
    *("requires_grad", "grad_fn", "grad", "output_nr", "_version", "_base", "_backward_hooks"),
}  # fmt: skip
METADATA: Final = _METHODS | {f"get.{name}" for name in _PROPERTIES}
HOOKS: Final = {
    *("register_hook", "retain_grad", "register_post_accumulate_grad_hook"),
    *("requires_grad_", "set.requires_grad"),
}
KNOWN: Final = (
    "slices, views, casts, cross_entropy, nll_loss, kl_div, (log_)softmax with gather, "
    "logsumexp, argmax, max, mean"
)
_WRITES: Final = {
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor")
}  # fmt: skip


def name_of(func: Callable[..., Any]) -> str:
    """A function's or method's name; `get.` or `set.` and the name of a property."""
    name = getattr(func, "__name__", str(func))
    owner = getattr(func, "__self__", None)
    return f"{name.strip('_')}.{owner.__name__}" if name in ("__get__", "__set__") and owner else name


def writes(name: str) -> bool:
    """Whether it writes to its first argument."""
    return name in _WRITES or (name.endswith("_") and not name.endswith("__")) or name.startswith("set.")

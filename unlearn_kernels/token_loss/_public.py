"""What the public operators over rows of a head share: checks, registration, calls."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import FLOATS, Backend, Impl, Operator, register, select
from unlearn_kernels.token_loss._checks import check_head, check_labels, check_logits, check_words
from unlearn_kernels.token_loss._rows import RowArguments

# Hidden states (*, d'), head (V, d') and, with a third, bias (V,) of a reference model.
Reference = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor | None]


def register_rows(
    name: str, formula: str, kernels: Callable[..., Any], reference: Callable[..., Any]
) -> None:
    """Registers an operator whose implementations take `RowArguments` and what else `run` passes on."""
    impls = {
        "cpp": Impl("cpp", kernels, ("cpu",), FLOATS, _ops.no_extension),
        "triton": Impl("triton", kernels, ("cuda",), FLOATS, _ops.no_triton_kernels),
        "reference": Impl("reference", reference, ("cpu", "cuda")),
    }
    register(Operator(name, "token_loss", formula, impls, differentiable=True))


def arguments(
    kind: int,
    h: Tensor,
    W: Tensor,
    bias: Tensor | None,
    reference: Reference | None,
    labels: Tensor | None,
    ignore_index: int,
    scale: float,
    softcap: float | None,
    beta: float = 0.0,
    offset: float = 0.0,
) -> RowArguments:
    """Checked arguments; the reference without its history."""
    check_head(h, W, bias)
    if labels is not None:
        labels = check_labels(h, labels)
    ref_h, ref_W, ref_bias = (None, None, None) if reference is None else _reference(h, W, reference)
    settings = check_logits(scale, softcap)
    return RowArguments(
        h, W, bias, ref_h, ref_W, ref_bias, labels, ignore_index, *settings, kind, float(beta), float(offset)
    )


def _reference(h: Tensor, W: Tensor, reference: Reference) -> tuple[Tensor, Tensor, Tensor | None]:
    if len(reference) not in (2, 3):
        raise ValueError(f"reference must be (h, W) or (h, W, bias), got {len(reference)} parts")
    ref_h, ref_W, *rest = (None if x is None else x.detach() for x in reference)
    if ref_h is None or ref_W is None:
        raise ValueError("reference must have hidden states and a head, got None")
    ref_bias = rest[0] if rest else None
    check_head(ref_h, ref_W, ref_bias, " of the reference")
    if ref_h.shape[:-1] != h.shape[:-1]:
        raise ValueError(
            f"reference: hidden states must have rows {tuple(h.shape[:-1])} as h, got {tuple(ref_h.shape[:-1])}"
        )
    if ref_W.shape[0] != W.shape[0]:
        raise ValueError(f"reference: its vocabulary must be {W.shape[0]} as that of W, got {ref_W.shape[0]}")
    if ref_h.device != h.device:
        raise ValueError(f"reference must be on the device of h, {h.device}, got {ref_h.device}")
    if (ref_h.dtype == torch.float64) != (h.dtype == torch.float64):
        raise ValueError(f"reference and h must both be float64 or neither, got {ref_h.dtype} and {h.dtype}")
    return ref_h, ref_W, ref_bias


def run(name: str, backend: Backend | None, args: RowArguments, *more: Any) -> Any:
    """The operator on the backend that was asked for, or the default."""
    tensors = tuple(x for x in args[:6] if isinstance(x, Tensor))
    call = select(name, backend, tensors)
    try:
        return call(*args, *more)
    except (RuntimeError, IndexError):
        if args.labels is not None:
            check_words(args.labels, args.weight.shape[0], args.ignore_index)
        raise

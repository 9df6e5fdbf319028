"""Takes out of a forget gradient what works against the retain gradient."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery.gramian import Scope

Rule = Literal["agem"]
_RULES: Final = {"agem": 0}
_NAMES: Final = ("forget", "retain")


class Conflict(NamedTuple):
    """What was found and done: all on the device of the gradients, so that looking is what costs a wait.

    Attributes:
        gramian: (2, 2) float64, inner products of (forget, retain) before the projection.
        weights: (2,) float64, those of forget and retain in what was written; `(1, 0)` without conflict.
    """

    gramian: Tensor
    weights: Tensor

    @property
    def cosine(self) -> Tensor:
        """The cosine between the two gradients before the projection, () float64; 0 where either is zero."""
        G = self.gramian
        norms = G[0, 0].sqrt() * G[1, 1].sqrt()
        return torch.where(norms == 0, 0.0, G[0, 1] / norms)


def _fake(forget: Sequence[Tensor], retain: Sequence[Tensor], rule: int) -> tuple[Tensor, Tensor]:
    return (
        forget[0].new_empty((2, 2), dtype=torch.float64),
        forget[0].new_empty((2,), dtype=torch.float64),
    )


def _triton(forget: Sequence[Tensor], retain: Sequence[Tensor], rule: int) -> tuple[Tensor, Tensor]:
    from unlearn_kernels.triton_kernels import surgery as kernels

    return kernels.project_conflict_(forget, retain, rule)


_ops.register_operator(
    "project_conflict",
    "surgery",
    "f -= min(0, <f, r>) / |r|^2 r over lists of tensors",
    reference=reference.project_conflict_,
    fake=_fake,
    triton=_triton,
    op="project_conflict_",
)


def _pairs(
    forget: Sequence[Tensor | None], retain: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The pairs that have a forget gradient, with zeros for a retain gradient of None, and their indices."""
    if len(forget) != len(retain):
        raise ValueError(f"forget and retain must have the same length, got {len(forget)} and {len(retain)}")
    fs, rs, kept = [], [], []
    for i, (f, r) in enumerate(zip(forget, retain, strict=True)):
        if f is not None:
            fs.append(f)
            rs.append(f.new_zeros(()).expand_as(f) if r is None else r)
            kept.append(i)
    return fs, rs, kept


def project_conflict_(
    forget: Sequence[Tensor | None],
    retain: Sequence[Tensor | None],
    *,
    rule: Rule = "agem",
    scope: Scope = "global",
    backend: Backend | None = None,
) -> Conflict:
    r"""Projects the forget gradient, in place, to where it no longer works against the retain gradient.

    .. math:: f \leftarrow f - \frac{\min(0, \langle f, r \rangle)}{\|r\|^2} \, r

    One pass reads both gradients; a second one reads them again and writes `f`, only where `<f, r> < 0`.

    Args:
        forget: N gradient tensors (float32, float64, bfloat16 or float16; any strides), changed in place.
            `None` leaves the pair out altogether: a parameter that does not forget takes no part.
        retain: N gradient tensors of the same shapes; dtypes and strides may differ. `None` counts as zero.
        rule: `agem`, the formula above.
        scope: `global`, one inner product over all tensors.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        A `Conflict` with the Gramian (2, 2) before the projection and the weights (2,), both float64. The
        weight is applied in double precision and each element rounded once, so that in float32 the cosine
        that is left is below 1e-8; bfloat16 and float16 keep what their own rounding makes. A retain
        gradient of zero projects nothing. With `<f, r> >= 0`, infinity included, nothing is written. Where
        `<f, r>` is NaN or `-inf` so is the weight, or NaN, and the formula's value is written: non-finite
        retain gradients are not hidden. Not differentiable.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not fit, `rule` or `scope` is unknown, or a
            tensor of `forget` overlaps in memory with itself or another one. `forget[i]` and `retain[i]`
            may be one tensor.

    Scratch: 24 bytes for every 16384 elements and 32 KB a thread.

    Source: A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420); for unlearning, github.com/tmlr-group/GRU.
    """
    _lists.check_choice("rule", rule, tuple(_RULES))
    _lists.check_scope(scope)
    fs, rs, kept = _pairs(forget, retain)
    if not fs:
        return Conflict(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64))
    call = _lists.kernel("project_conflict", backend, _NAMES, (fs, rs), kept)
    with torch.no_grad():
        found = _lists.written(_NAMES, fs, rs, lambda: call(fs, rs, _RULES[rule]), kept)
    return Conflict(*found)

"""A gradient kept in 8 bits an element, and the projection that reads it so."""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery_compressed as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery.conflict import Conflict

_BLOCK: Final = reference.BLOCK


def _fake_compress(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [x.new_empty(x.shape, dtype=torch.int8) for x in tensors],
        [x.new_empty((x.numel() + _BLOCK - 1) // _BLOCK, dtype=torch.float32) for x in tensors],
    )


def _fake_project(forget: Sequence[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return (
        forget[0].new_empty((2, 2), dtype=torch.float64),
        forget[0].new_empty((2,), dtype=torch.float64),
    )


def _triton_compress(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    from unlearn_kernels.triton_kernels.surgery import compressed as kernels

    return kernels.compress(tensors)


def _triton_decompress(out: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
    from unlearn_kernels.triton_kernels.surgery import compressed as kernels

    kernels.decompress_(out, codes, scales)


def _triton_project(
    forget: Sequence[Tensor], codes: Sequence[Tensor], scales: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    from unlearn_kernels.triton_kernels.surgery import compressed as kernels

    return kernels.project_conflict_compressed_(forget, codes, scales)


_ops.register_operator(
    "compress",
    "surgery",
    "int8 codes, a float32 scale for 256 elements",
    reference=reference.compress,
    fake=_fake_compress,
    triton=_triton_compress,
)
_ops.register_operator(
    "decompress",
    "surgery",
    "x = scale code",
    reference=reference.decompress_,
    fake=None,
    triton=_triton_decompress,
    op="decompress_",
)
_ops.register_operator(
    "project_conflict_compressed",
    "surgery",
    "f -= min(0, <f, r>) / |r|^2 r with r in 8 bits",
    reference=reference.project_conflict_compressed_,
    fake=_fake_project,
    triton=_triton_project,
    op="project_conflict_compressed_",
)


class CompressedGradient:
    r"""A list of gradients in 8 bits an element: int8 codes and a float32 scale for every 256 of them.

    .. math:: s_b = \max_{i \in b} |x_i| / 127, \qquad c_i = \operatorname{round}(x_i / s_b), \qquad x_i \approx s_b c_i

    The error of an element is at most half a scale, of the order of 1 % of the block's root mean square for normal
    numbers, and unbiased to first order. Blocks follow the order of the indices, each tensor begins a new one. A
    block with NaN or Inf comes back as NaN: it is not hidden. Ties round to even; the same codes on every
    backend. Memory: `n + 4 ceil(n / 256)` bytes, 1.016 an element where bfloat16 has 2.

    Args:
        tensors: N tensors, float32, float64, bfloat16 or float16.
        backend: see `unlearn_kernels.use_backend`.

    Attributes:
        codes: N int8 tensors of the shapes given.
        scales: N float32 tensors (blocks,).

    Raises:
        ValueError: if a tensor is of another dtype or device.
    """

    codes: list[Tensor]
    scales: list[Tensor]

    def __init__(self, tensors: Sequence[Tensor], *, backend: Backend | None = None) -> None:
        self.codes, self.scales = [], []
        self.device = tensors[0].device if tensors else torch.device("cpu")
        if tensors:
            call = _lists.kernel("compress", backend, ["tensors"], [tensors])
            with torch.no_grad():
                self.codes, self.scales = call(list(tensors))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(x.nbytes for x in (*self.codes, *self.scales))

    def decompress(
        self, dtype: torch.dtype = torch.float32, *, backend: Backend | None = None
    ) -> list[Tensor]:
        """The gradient, approximately, as new tensors."""
        out = [torch.empty(c.shape, dtype=dtype, device=self.device) for c in self.codes]
        if out:
            _lists.kernel("decompress", backend, ["out"], [out])(out, self.codes, self.scales)
        return out

    def project_conflict_(self, forget: Sequence[Tensor], *, backend: Backend | None = None) -> Conflict:
        """`surgery.project_conflict_(forget, self)` by A-GEM, with this as the retain gradient and read as it is.

        Args:
            forget: N tensors of the same shapes, changed in place.
            backend: see `unlearn_kernels.use_backend`.

        Returns:
            As `surgery.project_conflict_`: what is left of the conflict is measured against the compressed gradient.

        Raises:
            ValueError: if lengths, shapes or devices do not fit, or memory that is written overlaps.

        Scratch: 24 bytes for every 16384 elements, 16 KB a thread, and a copy of tensors that are not contiguous.
        """
        if len(forget) != len(self.codes):
            got = f"{len(forget)} and {len(self.codes)}"
            raise ValueError(f"forget and the compressed gradient must have the same length, got {got}")
        for i, (f, c) in enumerate(zip(forget, self.codes, strict=True)):
            if f.shape != c.shape:
                raise ValueError(f"forget[{i}] must have shape {tuple(c.shape)}, got {tuple(f.shape)}")
        if not forget:
            zero = torch.zeros(2, 2, dtype=torch.float64)
            return Conflict(zero, torch.tensor([1.0, 0.0], dtype=torch.float64), zero[0, :0])
        call = _lists.kernel("project_conflict_compressed", backend, ["forget"], [forget])
        with torch.no_grad():
            gramian, weights = _lists.written(
                ["forget"], forget, [], lambda: call(list(forget), self.codes, self.scales)
            )
        return Conflict(gramian, weights, weights[:0])

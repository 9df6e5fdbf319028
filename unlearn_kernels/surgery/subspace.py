"""Subspaces that updates must leave alone: a basis a layer, and gradients projected out of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from unlearn_kernels.surgery import _lists

Side = Literal["columns", "rows"]
_SIDES: Final[tuple[str, ...]] = get_args(Side)
_CHUNK: Final = 1 << 22  # elements of a half-precision gradient that are in float32 at once
_DEPENDENT: Final = 1e-10  # of a sample's square: what is left of it may be rounding


class Bases(NamedTuple):
    """Orthonormal bases of one layer, each (d, k) or None.

    Attributes:
        columns: of the space of inputs: `g -= (g M) M^T` for `g` (out, d).
        rows: of the space of outputs: `g -= M (M^T g)` for `g` (d, in).
    """

    columns: Tensor | None = None
    rows: Tensor | None = None


def _matrix(g: Tensor) -> Tensor:
    """`g` as (out, everything else), a vector as one row; a view where there is one."""
    return g.reshape(1, g.numel()) if g.dim() < 2 else g.flatten(1)


def _take_out(g: Tensor, M: Tensor) -> None:
    """`g -= (g M) M^T`, in place, for a matrix of any strides."""
    work = torch.float64 if g.dtype == torch.float64 else torch.float32
    M = M.to(g.device, work)
    if g.dtype == work:
        g.addmm_(g @ M, M.T, alpha=-1)
        return
    rows = max(1, _CHUNK // max(1, g.shape[1]))
    for part in g.split(rows):
        x = part.to(work)
        part.copy_(x.addmm_(x @ M, M.T, alpha=-1))


def _project(i: int, g: Tensor, bases: Bases) -> None:
    matrix = _matrix(g)
    for M, x, side in ((bases.columns, matrix, "columns"), (bases.rows, matrix.T, "rows")):
        if M is None:
            continue
        if M.dim() != 2 or M.shape[0] != x.shape[1]:
            got = f"{tuple(M.shape)}"
            raise ValueError(f"basis[{i}] of the {side} must have shape ({x.shape[1]}, k), got {got}")
        _take_out(x, M)
    if matrix.data_ptr() != g.data_ptr():
        g.copy_(matrix.view(g.shape))


@torch.no_grad()
def project_out_(gradients: Sequence[Tensor | None], basis: Sequence[Tensor | Bases | None]) -> None:
    r"""Takes a subspace out of each gradient, in place and in factored form.

    .. math:: g \leftarrow g - (g M) M^\top \ \text{(columns)}, \qquad g \leftarrow g - M (M^\top g) \ \text{(rows)}

    `4 o d k` operations for a gradient (o, d) and a basis of k vectors, where the dense projector of published
    code costs `2 o d^2` and `d^2` numbers of memory. Both products are torch's: they read and write `g` once each and
    M stays in the cache, so that up to some tens of vectors memory is the limit, beyond that the product.

    Args:
        gradients: N gradients, changed in place; of more than two dimensions as (out, rest), vectors as one row.
            `None` is passed over.
        basis: N bases with orthonormal columns: (d, k) for the columns, `Bases` for either side or both, or
            `None`.

    float64 gradients are projected in float64, others in float32 and rounded once a side.

    Raises:
        ValueError: if lengths or shapes do not fit.

    Scratch: `o k` numbers, and `16` MB for a gradient in half precision; a copy of one that has no matrix view.

    Sources: GPM, Saha et al. 2021 (arXiv 2103.09762); PGU, Hoang et al. 2024 (arXiv 2312.04095),
    github.com/hnanhtuan/projected_gradient_unlearning.
    """
    if len(gradients) != len(basis):
        got = f"{len(gradients)} and {len(basis)}"
        raise ValueError(f"gradients and basis must have the same length, got {got}")
    for i, (g, M) in enumerate(zip(gradients, basis, strict=True)):
        if g is not None and M is not None:
            _project(i, g, M if isinstance(M, Bases) else Bases(columns=M))


class SubspaceMemory:
    r"""The spaces that a model's layers use on what it shall keep, gathered batch by batch.

    For samples `R` (n, d) and the basis `M` so far, the left singular vectors of the remainder
    `R^\top - M M^\top R^\top` join `M`, in the order of their singular values, until

    .. math:: \|M M^\top R^\top\|_F^2 + \sum_{i \le r} \sigma_i^2 \ge \text{threshold} \cdot \|R\|_F^2 .

    Args:
        threshold: the share of the samples' energy that the basis has to hold, in [0, 1].
        max_rank: vectors a basis at most; by default as many as its space has dimensions.

    Raises:
        ValueError: if a number is out of range.

    Bases are computed in float64 and kept in float32 on the device of the first samples. The published code
    of GPM takes one vector less than the threshold asks for in a first task, and exactly as many in later ones; PGU
    decomposes `R^\top R`, which squares the condition.

    Sources: as of `project_out_`.
    """

    def __init__(self, threshold: float = 0.95, *, max_rank: int | None = None) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
        if max_rank is not None and max_rank < 0:
            raise ValueError(f"max_rank must be at least 0, got {max_rank}")
        self.threshold, self.max_rank = threshold, max_rank
        self._bases: dict[str, Bases] = {}

    def __getitem__(self, name: str) -> Bases:
        return self._bases.get(name, Bases())

    def names(self) -> Iterable[str]:
        """The layers that have a basis."""
        return self._bases.keys()

    @torch.no_grad()
    def update(self, name: str, samples: Tensor, *, side: Side = "columns") -> int:
        """Extends a layer's basis to hold these samples, and returns its rank.

        Args:
            name: of the layer, usually of its weight.
            samples: (..., d): inputs of the layer (unfolded patches of a convolution), or gradients of the
                weight, whose rows lie in the space of inputs; for the rows output gradients, or the
                gradient transposed.
            side: the space that the samples lie in.

        Raises:
            ValueError: for an unknown side, samples that are not finite, or of another width than before.
        """
        _lists.check_choice("side", side, _SIDES)
        R = samples.detach().reshape(-1, samples.shape[-1]).double()
        if not bool(R.isfinite().all()):
            raise ValueError(f"samples of {name} must be finite")
        M = getattr(self[name], side)
        if M is not None and M.shape[0] != R.shape[1]:
            raise ValueError(f"samples of {name} must have {M.shape[0]} features, got {R.shape[1]}")
        M = R.new_zeros(R.shape[1], 0) if M is None else M.double()
        self._bases[name] = self[name]._replace(**{side: self._extended(M, R).float()})
        return int(getattr(self[name], side).shape[1])

    def _extended(self, M: Tensor, R: Tensor) -> Tensor:
        total = float(R.square().sum())
        rest = R - (R @ M) @ M.T
        rest -= (rest @ M) @ M.T  # a second time: the first leaves rounding of the size of R
        _, sigma, V = torch.linalg.svd(rest, full_matrices=False)
        energy = sigma.square()
        energy = torch.where(energy > _DEPENDENT * total, energy, 0.0)
        held = float((R @ M).square().sum())
        reached = held + torch.cumsum(energy, 0) - energy  # before each vector joins
        wanted = int(((reached < self.threshold * total * (1 - 1e-12)) & (energy > 0)).sum())
        most = M.shape[0] if self.max_rank is None else min(self.max_rank, M.shape[0])
        wanted = max(0, min(wanted, most - M.shape[1]))
        return torch.linalg.qr(torch.cat([M, V[:wanted].T], dim=1)).Q

    def project_(self, gradients: Mapping[str, Tensor | None]) -> None:
        """`project_out_` of every gradient by name; those without a basis are left alone."""
        project_out_(list(gradients.values()), [self[name] for name in gradients])

    def state_dict(self) -> dict[str, Any]:
        """Bases and settings: tensors and numbers that `torch.save` takes."""
        bases = {name: b._asdict() for name, b in self._bases.items()}
        return {"threshold": self.threshold, "max_rank": self.max_rank, "bases": bases}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave."""
        self.threshold, self.max_rank = state["threshold"], state["max_rank"]
        bases = state["bases"].items()
        self._bases = {name: Bases(**{side: M for side, M in b.items()}) for name, b in bases}

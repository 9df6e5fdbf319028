"""Bergson's global projection without its matrix, and the best scores of a run without a file of all of them.

.. code-block:: python

    from unlearn_adapters import bergson as kernels

    kernels.install()                          # projection_target="global" from now on
    writer = kernels.TopKWriter(num_queries, k=100)
    Scorer(query_grads, modules, writer, device, dtype)
    ...
    found = writer.found()

Bergson's projections are the same on every device, and so are these, but of other numbers: a store of projected
gradients must be made and searched with the same of the two.
"""

import hashlib
import sys
from typing import Any, Final, Literal

import torch
from bergson.collector import collector as theirs
from bergson.gradients import OuterProductGradients
from bergson.score.score_writer import ScoreWriter
from torch import Tensor

from unlearn_kernels.influence import Ends, Found, Projection, merge
from unlearn_kernels.influence.projection import Name
from unlearn_kernels.per_sample import linear

_THEIRS: Final = theirs.project_global
_KINDS: Final[dict[str, Name]] = {"rademacher": "rademacher", "normal": "gaussian"}


def _seed(identifier: str) -> int:
    return int.from_bytes(hashlib.md5(identifier.encode()).digest()[:8], "little") >> 1


def project_global(
    identifier: str,
    P: Tensor | OuterProductGradients,
    m: int,
    projection_type: Literal["normal", "rademacher"] = "normal",
    projection_scale: Literal["jl", "row_norm"] = "jl",
) -> Tensor:
    """Return `P R^T`, (N, m), for the matrix R that `identifier` names, no part of which is in memory.

    Args:
        identifier: names R.
        P: gradients (N, n), or outer products of one example a row, (N, S, O) and (N, S, W), which are projected from
            their factors.
        m: outputs.
        projection_type: `normal` or `rademacher`.
        projection_scale: `jl` divides by `sqrt(m)`, `row_norm` by the norms of R's rows: `sqrt(n)` for `rademacher`,
            within `1 / sqrt(2 n)` of it for `normal`, where it is refused.

    Raises:
        ValueError: for another type, or `row_norm` of `normal`.
    """
    if projection_type not in _KINDS:
        raise ValueError(f"projection_type must be normal or rademacher, got {projection_type!r}")
    if projection_scale == "row_norm" and projection_type == "normal":
        raise ValueError("projection_scale must be 'jl' for projection_type 'normal', got 'row_norm'")
    if isinstance(P, OuterProductGradients):
        n, dtype = P.g.shape[-1] * P.a.shape[-1], P.g.dtype
        y = _of_factors(P, Projection(n, m, _KINDS[projection_type], _seed(identifier)))
    else:
        n, dtype = P.shape[1], P.dtype
        y = Projection(n, m, _KINDS[projection_type], _seed(identifier)).project(P.detach())
    scale = (m / n) ** 0.5 if projection_scale == "row_norm" else 1.0
    return (y * scale).to(dtype)


def _of_factors(P: OuterProductGradients, projection: Projection) -> Tensor:
    if P.divisor is not None:
        return projection.project(P.materialize().flatten(1))
    a, g = (x if P.per_example else x[:, None] for x in (P.a, P.g))
    y = linear.project(a, g, projection)
    if P.bias is not None:
        assert P.bias_col is not None
        y = y + linear.project(P.bias_col.expand(len(P.bias), 1, -1), P.bias[:, None], projection)
    return y


class TopKWriter(ScoreWriter):
    """A writer for Bergson's `Scorer` that keeps the k largest and k smallest scores of each query: no N x Q file.

    Args:
        num_queries: queries in all.
        k: how many to keep at either end.

    Raises:
        ValueError: if a number is less than 1.
    """

    def __init__(self, num_queries: int, k: int) -> None:
        for name, value in (("num_queries", num_queries), ("k", k)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.k = k
        self._ends: list[list[Found | None]] = [[None] * num_queries for _ in range(2)]

    def __call__(self, indices: list[int], scores: Tensor, query_offset: int = 0) -> None:
        """Take in scores (rows, width) of queries `query_offset` on, for the rows of these numbers."""
        rows = torch.as_tensor(indices)
        if scores.shape[0] != len(rows):
            raise ValueError(f"scores must have {len(rows)} rows, one a sample, got {tuple(scores.shape)}")
        for column, values in enumerate(scores.detach().float().cpu().T):
            one = Found(values[None], rows[None], rows[None])
            for largest, end in zip((True, False), self._ends, strict=True):
                kept = end[query_offset + column]
                end[query_offset + column] = merge(
                    [one] if kept is None else [kept, one], self.k, largest=largest
                )

    def flush(self) -> None:
        """There is nothing to write."""

    def found(self) -> Ends:
        """The best of both ends: scores and row numbers, (Q, at most k), equal scores by row number.

        Raises:
            ValueError: if a query has no scores.
        """
        if any(one is None for end in self._ends for one in end):
            raise ValueError("scores must have come for every query")
        ends = [[one for one in end if one is not None] for end in self._ends]
        return Ends(*(Found(*(torch.cat(x) for x in zip(*end, strict=True))) for end in ends))

    @property
    def scores(self) -> Any:
        """There are no scores but the best: `found`."""
        raise AttributeError("TopKWriter keeps the best scores only: call found()")


def install() -> None:
    """Puts `project_global` in the place of Bergson's, wherever it is loaded."""
    _exchange(_THEIRS, project_global)


def uninstall() -> None:
    """Puts Bergson's back."""
    _exchange(project_global, _THEIRS)


def _exchange(old: Any, new: Any) -> None:
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] == "bergson" and getattr(module, "project_global", None) is old:
            module.project_global = new  # type: ignore[attr-defined]

"""Random projection of gradients, and the streaming top-k of inner products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import faiss, trak
from benchmarks.peers.compiled import compiled
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_CHECKED_OUTPUTS = 64
_CHECKED_AT_ONCE = 1 << 16
_CHUNK = 8192


class Gradients(NamedTuple):
    """A batch of flat gradients (B, dim), and the size to project them to."""

    g: Tensor
    k: int


class Search(NamedTuple):
    """Queries (Q, D) and stored rows (N, D)."""

    queries: Tensor
    rows: Tensor
    k: int


class Found(NamedTuple):
    """Scores (Q, k) in falling order and the rows that they belong to."""

    values: Tensor
    indices: Tensor


def _projection(inputs: Gradients) -> Any:
    from unlearn_kernels import influence

    return influence.Projection(inputs.g.shape[1], inputs.k, kind="rademacher", seed=0)


def _outputs(k: int) -> Tensor:
    """The outputs that are checked."""
    return torch.arange(0, k, max(1, k // _CHECKED_OUTPUTS))


def _projected64(inputs: Gradients) -> Tensor | None:
    """A sample of the outputs in float64, with the signs of the reference; None without the package."""
    try:
        projection = _projection(inputs)
    except ImportError:
        return None
    g = inputs.g.cpu()
    outputs, dim = _outputs(inputs.k), g.shape[1]
    total = torch.zeros(len(g), len(outputs), dtype=torch.float64)
    for start in range(0, dim, _CHECKED_AT_ONCE):
        at = torch.arange(start, min(start + _CHECKED_AT_ONCE, dim))
        total += g[:, at].double() @ projection.signs(outputs, at).double().T
    return total * inputs.k**-0.5


def _projection_error(inputs: Gradients, output: Tensor, reference: Tensor) -> float:
    return testing.relative_error(output[:, _outputs(inputs.k)].cpu(), reference)


def _distortion(inputs: Gradients, output: Tensor, _: Tensor | None) -> float:
    """The largest relative change of a squared norm, for projections with random numbers of their own."""
    true = inputs.g.double().square().sum(1)
    return float((output.double().square().sum(1) / true - 1).abs().max())


def _ours_project(inputs: Gradients) -> Call:
    projection = _projection(inputs)
    return Call(lambda: projection(inputs.g))


def _trak(kind: str, k: int) -> Provider:
    # A squared norm has a relative standard deviation of sqrt(2/k); five of them for the largest of a batch.
    return Provider(
        f"trak BasicProjector, {kind}",
        lambda x: Call(trak.project(x.g, x.k, kind)),
        requires=("trak",),
        error=_distortion,
        bound=5 * (2 / k) ** 0.5,
    )


def _resident(inputs: Gradients) -> Call:
    dim, k = inputs.g.shape[1], inputs.k
    generator = torch.Generator(inputs.g.device).manual_seed(0)
    signs = torch.randint(0, 2, (dim, k), generator=generator, device=inputs.g.device) * 2.0 - 1.0
    matrix = (signs * k**-0.5).to(inputs.g.dtype)
    return Call(lambda: inputs.g @ matrix)


def _gradients(B: int, dim: int, k: int, dtype: torch.dtype) -> Callable[[str], Gradients]:
    def make(device: str) -> Gradients:
        return Gradients(testing.randn(B, dim, dtype=dtype, device=device), k)

    return make


def _project(
    B: int, dim: int, k: int, dtype: torch.dtype, label: str, warm: Case | None, resident: bool
) -> Case:
    providers = [
        Provider("unlearn_kernels", _ours_project, "ours"),
        _trak("rademacher", k),
        _trak("normal", k),
    ]
    if resident:
        bound = 5 * (2 / k) ** 0.5
        providers.append(
            Provider("torch.mm, matrix in memory before", _resident, "plain", error=_distortion, bound=bound)
        )
    return register(
        Case(
            f"influence.Projection/{label}/{str(dtype).removeprefix('torch.')}",
            ops=("rademacher_project",),
            shape=f"{B} x {dim} -> {k}",
            dtype=dtype,
            flops=2 * B * dim * k,
            bytes=B * dim * dtype.itemsize,
            make=_gradients(B, dim, k, dtype),
            reference=_projected64,
            error=_projection_error,
            providers=tuple(providers),
            bound=1e-6,
            threads=1,
            warm=warm,
        )
    )


def _ours_topk(inputs: Search) -> Call:
    from unlearn_kernels import influence

    return Call(lambda: Found(*influence.topk(inputs.queries, inputs.rows, inputs.k)))


def full(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The whole Q × N score matrix, then its top k."""
    return torch.topk(queries @ rows.T, k)


def chunked(queries: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chunks of rows in fp32, each merged into the best so far."""
    wide = queries.float()
    values = torch.full((len(queries), k), -torch.inf, device=queries.device)
    indices = torch.full((len(queries), k), -1, device=queries.device)
    for start in range(0, len(rows), _CHUNK):
        scores = wide @ rows[start : start + _CHUNK].float().T
        best, at = torch.topk(scores, min(k, scores.shape[1]))
        values, chosen = torch.topk(torch.cat((values, best), 1), k)
        indices = torch.cat((indices, at + start), 1).gather(1, chosen)
    return values, indices


def _compiled(inputs: Search) -> Call:
    function = compiled(full)
    return Call(lambda: Found(*function(inputs.queries, inputs.rows, inputs.k)))


_TOPK = (
    Provider("unlearn_kernels", _ours_topk, "ours"),
    Provider("torch matmul + topk", lambda x: Call(lambda: Found(*full(*x))), "plain"),
    Provider("torch in chunks, fp32", lambda x: Call(lambda: Found(*chunked(*x)))),
    Provider("torch.compile", _compiled, compiled=True),
    Provider("faiss flat", lambda x: _faiss(x), requires=("faiss",), devices=("cpu",)),
)


def _faiss(inputs: Search) -> Call:
    run = faiss.search(*inputs)
    return Call(lambda: Found(*run()))


def _best64(inputs: Search) -> Found:
    queries, parts = inputs.queries.double(), []
    for chunk in inputs.rows.split(_CHUNK):
        parts.append((queries @ chunk.double().T).cpu())
    return Found(*torch.topk(torch.cat(parts, 1), inputs.k))


def _topk_error(inputs: Search, output: Found, reference: Found) -> float:
    """Of the values told, and of the true scores of the rows chosen, relative to a query's best score."""
    rows = inputs.rows[output.indices.to(inputs.rows.device)].double()
    true = torch.einsum("qd,qkd->qk", inputs.queries.double(), rows).cpu()
    scale = reference.values[:, :1].abs()
    chosen = (true.sort(1, descending=True).values - reference.values).abs() / scale
    told = (output.values.cpu().double() - true).abs() / scale
    return float(torch.maximum(chosen, told).max())


def _recall(inputs: Search, output: Found, reference: Found) -> dict[str, float]:
    pairs = zip(output.indices.tolist(), reference.indices.tolist(), strict=True)
    shared = sum(len(set(a) & set(b)) for a, b in pairs)
    return {"recall": shared / reference.indices.numel()}


def _store(Q: int, N: int, D: int, k: int, dtype: torch.dtype) -> Callable[[str], Search]:
    def make(device: str) -> Search:
        queries = testing.randn(Q, D, dtype=dtype, seed=1, device=device)
        return Search(queries, testing.randn(N, D, dtype=dtype, seed=2, device=device), k)

    return make


def _topk(Q: int, N: int, D: int, k: int, dtype: torch.dtype, label: str, warm: Case | None) -> Case:
    return register(
        Case(
            f"influence.topk/{label}/{str(dtype).removeprefix('torch.')}",
            ops=("topk",),
            shape=f"{Q} x {N} x {D}, top {k}",
            dtype=dtype,
            flops=2 * Q * N * D,
            bytes=N * D * dtype.itemsize + Q * k * 12,
            make=_store(Q, N, D, k, dtype),
            reference=_best64,
            error=_topk_error,
            providers=_TOPK,
            bound=1e-6,
            threads=1,
            metrics=_recall,
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    _small_project = _project(8, 8192, 256, _dtype, "small", None, True)
    if _dtype == torch.float32:
        _project(32, 65_536, 512, _dtype, "65k-to-512", _small_project, True)
        _project(32, 1_000_000, 512, _dtype, "1M-to-512", _small_project, False)
        _project(32, 1_000_000, 2048, _dtype, "1M-to-2048", _small_project, False)
    _small_topk = _topk(10, 8192, 128, 10, _dtype, "small", None)
    _topk(100, 200_000, 1024, 100, _dtype, "100x200k", _small_topk)

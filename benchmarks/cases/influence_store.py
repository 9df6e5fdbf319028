"""The gradient store: both ends of each query's ranking in one scan, and appending, beside the disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.influence import chunked
from benchmarks.peers import faiss
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_CHUNK = 8192
_BATCH = 1024
_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4}
_BLOCK = 128  # columns that share a scale, `GradientStore.create`'s default


class Folder:
    """A folder of its own, gone with this object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)


class Search(NamedTuple):
    """Queries (Q, D), the rows (N, D) as they were given, and the store that holds them."""

    queries: Tensor
    rows: Tensor
    k: int
    kept: Folder


class Writing(NamedTuple):
    """Rows (N, D), and where to write them."""

    rows: Tensor
    dtype: str
    kept: Folder


class Both(NamedTuple):
    """Scores and row numbers (Q, k): of the largest, then of the smallest."""

    values: Tensor
    indices: Tensor
    low_values: Tensor
    low_indices: Tensor


def _bytes(N: int, D: int, dtype: str) -> int:
    """What a search has to read: rows and their scales."""
    scales = 4 * -(-D // _BLOCK) if dtype.startswith("int") else 0
    return N * (D * _BITS[dtype] // 8 + scales)


def _create(kept: Folder, rows: Tensor, dtype: str) -> None:
    from unlearn_kernels.influence import GradientStore

    with GradientStore.create(kept.path / "store", rows.shape[1], dtype) as store:  # type: ignore[arg-type]
        for part in rows.split(_BATCH):
            store.append(part)


def _filled(Q: int, N: int, D: int, k: int, dtype: str) -> Callable[[str], Search]:
    def make(device: str) -> Search:
        rows, kept = testing.randn(N, D, seed=2), Folder()
        _create(kept, rows, dtype)
        return Search(testing.randn(Q, D, seed=1), rows, k, kept)

    return make


def _ours(x: Search) -> Call:
    from unlearn_kernels.influence import GradientStore

    store = GradientStore.open(x.kept.path / "store")
    store.ends(x.queries[:1], 1)  # the file is in memory, and mapped

    def run() -> Both:
        top, low = store.ends(x.queries, x.k)
        return Both(top.values, top.indices, low.values, low.indices)

    return Call(run)


def _chunks(x: Search) -> Both:
    return Both(*chunked(x.queries, x.rows, x.k), *_smallest(x))


def _smallest(x: Search) -> tuple[Tensor, Tensor]:
    values, indices = chunked(-x.queries, x.rows, x.k)
    return -values, indices


def _faiss(x: Search) -> Call:
    """Both ends: an index has the largest only, so the queries and their opposites are searched."""
    run = faiss.search(torch.cat((x.queries, -x.queries)), x.rows, x.k)

    def both() -> Both:
        values, indices = run()
        half = len(x.queries)
        return Both(values[:half], indices[:half], -values[half:], indices[half:])

    return Call(both)


def _faiss_top(x: Search) -> Call:
    return Call(faiss.search(x.queries, x.rows, x.k))


def _exact(x: Search | Codes) -> Both:
    """Of the rows as they were given, in float64."""
    queries = x.queries.double()
    scores = torch.cat([queries @ part.double().T for part in x.rows.split(_CHUNK)], 1)
    return Both(*torch.topk(scores, x.k), *torch.topk(scores, x.k, largest=False))


def _taken(x: Search | Codes, values: Tensor, indices: Tensor, exact: Tensor) -> float:
    """Of the values told, against the true scores of the rows chosen, relative to a query's best score."""
    rows = x.rows[indices].double()
    true = torch.einsum("qd,qkd->qk", x.queries.double(), rows)
    return float(((values.double() - true).abs() / exact[:, :1].abs()).max())


def _error(x: Search | Codes, output: Both, reference: Both) -> float:
    top = _taken(x, output.values, output.indices, reference.values)
    return max(top, _taken(x, output.low_values, output.low_indices, reference.low_values))


def _top_error(x: Search, output: tuple[Tensor, Tensor], reference: Both) -> float:
    return _taken(x, output[0], output[1], reference.values)


def _recall(x: Search | Codes, output: Both, reference: Both) -> dict[str, float]:
    ends = ((output.indices, reference.indices), (output.low_indices, reference.low_indices))
    pairs = [(set(a), set(b)) for got, true in ends for a, b in zip(got.tolist(), true.tolist(), strict=True)]
    return {"recall": sum(len(a & b) for a, b in pairs) / sum(len(b) for _, b in pairs)}


# How far a format's scores are from those of the rows given, at most: rounding errors of a row add up at random.
_BOUNDS = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 2e-2, "int4": 3e-1}


def _scan(Q: int, N: int, D: int, k: int, dtype: str, label: str) -> Case:
    peers = (
        Provider("torch in chunks, fp32, both ends", lambda x: Call(lambda: _chunks(x)), "plain"),
        Provider("faiss flat fp32, both ends", _faiss, requires=("faiss",), devices=("cpu",)),
        Provider(
            "faiss flat fp32, one end", _faiss_top, requires=("faiss",), devices=("cpu",), error=_top_error
        ),
    )
    return register(
        Case(
            f"influence.GradientStore.ends/{label}/{dtype}",
            ops=("scan_codes" if dtype.startswith("int") else "scan_rows",),
            shape=f"{Q} x {N} x {D}, top {k} and bottom {k}",
            dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
            flops=2 * Q * N * D,
            bytes=_bytes(N, D, dtype) + 2 * Q * k * 12,
            make=_filled(Q, N, D, k, dtype),
            reference=_exact,
            error=_error,
            providers=(Provider("unlearn_kernels", _ours, "ours", devices=("cpu",)), *peers),
            bound=_BOUNDS[dtype],
            threads=1,
            metrics=_recall,
            memory_unit=4 * Q * N,
        )
    )


class Codes(NamedTuple):
    """Queries (Q, D), the rows (N, D) as they were given, and their integers and scales where queries are."""

    queries: Tensor
    rows: Tensor
    k: int
    codes: Tensor
    scales: Tensor
    dtype: str


def _coded(Q: int, N: int, D: int, k: int, dtype: str) -> Callable[[str], Codes]:
    def make(device: str) -> Codes:
        from unlearn_kernels.influence import _codes

        rows = testing.randn(N, D, seed=2, device="cpu")
        coded = (x.to(device) for x in _codes.encode(rows, dtype, _BLOCK)[0])
        return Codes(testing.randn(Q, D, seed=1, device=device), rows.to(device), k, *coded, dtype)

    return make


def _scan_codes(x: Codes) -> Call:
    from unlearn_kernels.influence import _codes

    def run() -> Both:
        codes, scales = _codes.query_codes(x.queries)
        scan = torch.ops.unlearn_kernels.scan_codes
        values, indices = scan(codes, scales, x.codes, x.scales, _BLOCK, x.k, x.dtype == "int4", 3)
        return Both(values[0], indices[0], values[1], indices[1])

    return Call(run)


def _decoded(x: Codes) -> Call:
    """Chunks of rows made floats again, each with a matrix product and two selections."""
    from unlearn_kernels.influence import _codes

    def run() -> Both:
        found = []
        for start in range(0, len(x.codes), _CHUNK):
            part = _codes.Coded(x.codes[start : start + _CHUNK], x.scales[start : start + _CHUNK])
            scores = x.queries @ _codes.decode(part, x.dtype, x.rows.shape[1], _BLOCK).T
            ends = [torch.topk(scores, min(x.k, scores.shape[1]), largest=end) for end in (True, False)]
            found.append([y for end in ends for y in (end.values, end.indices + start)])
        high, at, low, low_at = (torch.cat(y, 1) for y in zip(*found, strict=True))
        top, bottom = torch.topk(high, x.k), torch.topk(low, x.k, largest=False)
        return Both(top.values, at.gather(1, top.indices), bottom.values, low_at.gather(1, bottom.indices))

    return Call(run)


def _resident(Q: int, N: int, D: int, k: int, dtype: str, label: str, warm: Case | None) -> Case:
    """Rows on the device already; the CPU reads large ones from a store, above."""
    devices = ("cpu", "cuda") if warm is None else ("cuda",)
    return register(
        Case(
            f"influence.scan_codes/{label}/{dtype}",
            ops=("scan_codes",),
            shape=f"{Q} x {N} x {D}, top {k} and bottom {k}",
            dtype=torch.float32,
            flops=2 * Q * N * D,
            bytes=_bytes(N, D, dtype) + 2 * Q * k * 12,
            make=_coded(Q, N, D, k, dtype),
            reference=_exact,
            error=_error,
            providers=(
                Provider("unlearn_kernels", _scan_codes, "ours", devices=devices),
                Provider("torch, decoded in chunks", _decoded, "plain", devices=devices),
            ),
            bound=_BOUNDS[dtype],
            peer_bound=_BOUNDS[dtype],
            threads=1,
            metrics=_recall,
            warm=warm,
            memory_unit=4 * Q * N,
        )
    )


def _writing(N: int, D: int, dtype: str) -> Callable[[str], Writing]:
    return lambda device: Writing(testing.randn(N, D), dtype, Folder())


def _append(x: Writing) -> Call:
    def run() -> Tensor:
        _create(x.kept, x.rows, x.dtype)
        return x.rows[:1]

    return Call(run, reset=lambda: shutil.rmtree(x.kept.path / "store", ignore_errors=True))


def _sequential(x: Writing) -> Call:
    """A file of as many bytes, synchronised."""
    path = x.kept.path / "plain"
    content: Any = x.rows.view(torch.uint8).numpy().reshape(-1)[: _bytes(*x.rows.shape, x.dtype)]

    def run() -> Tensor:
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return x.rows[:1]

    return Call(run, reset=lambda: path.unlink(missing_ok=True))


def _written(x: Writing, output: Tensor, _: Tensor) -> float:
    """What is read back, against the rows."""
    from unlearn_kernels.influence import GradientStore

    rows = torch.cat([part for _, part in GradientStore.open(x.kept.path / "store").blocks()])
    return float((rows - x.rows).abs().max() / x.rows.abs().max())


def _rate(N: int, D: int, dtype: str, label: str, warm: Case | None) -> Case:
    size = _bytes(N, D, dtype)
    return register(
        Case(
            f"influence.GradientStore.append/{label}/{dtype}",
            ops=(),
            shape=f"{N} x {D}, {size / 1e6:.0f} MB",
            dtype=torch.bfloat16 if dtype == "bfloat16" else torch.float32,
            flops=2 * N * D,
            bytes=size + 4 * N * D,
            make=_writing(N, D, dtype),
            reference=lambda x: x.rows[:1],
            error=_written,
            providers=(
                Provider("unlearn_kernels", _append, "ours", devices=("cpu",)),
                Provider(
                    "a file of as many bytes",
                    _sequential,
                    "plain",
                    devices=("cpu",),
                    error=lambda x, output, _: 0.0,
                ),
            ),
            bound={"float32": 1e-12, "bfloat16": 2**-8, "int8": 0.51 / 127, "int4": 0.51 / 7}[dtype],
            threads=1,
            warm=warm,
        )
    )


for _dtype in _BITS:
    _scan(10, 2048, 256, 10, _dtype, "small")
    if _dtype != "float32":
        _scan(100, 200_000, 1024, 100, _dtype, "100x200k")
    for _queries in (1, 8):
        _scan(_queries, 200_000, 1024, 100, _dtype, f"{_queries}x200k")
    if _dtype.startswith("int"):
        _small_codes = _resident(10, 2048, 256, 10, _dtype, "small", None)
        _resident(100, 200_000, 1024, 100, _dtype, "100x200k", _small_codes)
        _resident(1, 200_000, 1024, 100, _dtype, "1x200k", _small_codes)
    _small_rate = _rate(2048, 256, _dtype, "small", None)
    _rate(131_072, 1024, _dtype, "131k", _small_rate)

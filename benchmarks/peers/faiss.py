"""faiss-cpu: exact inner-product search over a flat index. The index holds its own copy of the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def search(queries: Tensor, rows: Tensor, k: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """The call; the index is built outside of it, with rows of 32 or, for bfloat16 rows, of 16 bits."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    dimension = rows.shape[1]
    if rows.dtype == torch.bfloat16:
        kind = faiss.ScalarQuantizer.QT_bf16
        index = faiss.IndexScalarQuantizer(dimension, kind, faiss.METRIC_INNER_PRODUCT)
        index.is_trained = True
    else:
        index = faiss.IndexFlatIP(dimension)
    for chunk in rows.split(65536):
        index.add(chunk.float().numpy())
    asked = queries.float().numpy()

    def run() -> tuple[Tensor, Tensor]:
        values, indices = index.search(asked, k)
        return torch.from_numpy(values), torch.from_numpy(indices)

    return run

"""The definition of `linear_nll` in extended precision, exact beside float64, whose reference rounds as kernels do."""

from typing import Any

import numpy as np
from torch import Tensor

Head = Any  # conftest.Head


def nll_and_gradients(
    x: Head,
    upstream: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "none",
) -> list[np.ndarray]:
    """The values, or what `reduction` makes of them, and the gradients of h, W and the bias.

    Args:
        x: the head; labels of -100 do not count.
        upstream: the values' gradient where they are not reduced.
        scale: of the logits.
        softcap: of the logits, or None.
        reduction: "none", "sum" or "mean".
    """
    h, W = (t.double().numpy().astype(np.longdouble) for t in (x.h.reshape(-1, x.h.shape[-1]), x.W))
    labels = x.labels.flatten().numpy()
    kept = labels != -100
    dy = np.ones(len(h)) if upstream is None else upstream.flatten().double().numpy()
    dy = kept * dy.astype(np.longdouble) / (kept.sum() if reduction == "mean" else 1)

    z = h @ W.T if x.bias is None else h @ W.T + x.bias.double().numpy().astype(np.longdouble)
    z, slope = z * np.longdouble(scale), np.longdouble(scale)
    if softcap is not None:
        t = np.tanh(z / np.longdouble(softcap))
        z, slope = t * np.longdouble(softcap), slope * (1 - t * t)
    log_p = z - z.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    nll = -log_p[np.arange(len(h)), labels * kept] * kept
    value = nll.reshape(x.labels.shape)
    if reduction != "none":
        value = nll.sum() / (kept.sum() if reduction == "mean" else 1)
    d_z = (np.exp(log_p) - (np.arange(len(W)) == labels[:, None])) * slope * dy[:, None]
    return [np.asarray(value), (d_z @ W).reshape(x.h.shape), d_z.T @ h, d_z.sum(0)]

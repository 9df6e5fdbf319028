from types import SimpleNamespace
import torch
from torch import Tensor
from torch.nn import functional as F
from unlearn_kernels.per_sample import linear as _linear
from unlearn_kernels.per_sample._types import Gradients, TwoSided


def _fold(x):
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _acc(x):
    return x.double() if x.dtype == torch.float64 else x.float()


def _lgrads(A, G, *, bias=False, backend=None):
    a, g = _acc(_fold(A)), _acc(_fold(G))
    return Gradients(g.transpose(1, 2) @ a, g.sum(1) if bias else None)


def _ldots(s1, s2, *, summed=False, bias=False, backend=None):
    x = _lgrads(*s1).weight.flatten(1)
    y = _lgrads(*s2).weight.flatten(1)
    return x @ y.sum(0) if summed else x @ y.T


def _proj(W, projection):
    if isinstance(projection, TwoSided):
        return (projection.left @ W @ projection.right.T).flatten(1)
    return projection.project(W.flatten(1))


linear = SimpleNamespace(
    sqnorms=_linear.sqnorms,
    weighted_sum=_linear.weighted_sum,
    grads=_lgrads,
    dots=_ldots,
    project=lambda A, G, projection, **k: _proj(_lgrads(A, G).weight, projection),
)


def _egrads(ids, G, *, num_embeddings, padding_idx=None, backend=None):
    ids = ids.reshape(1, -1) if ids.dim() == 1 else ids
    ids = ids.expand(G.shape[:-1]).reshape(G.shape[0], -1)
    g = _acc(_fold(G))
    out = g.new_zeros(g.shape[0], num_embeddings, g.shape[-1])
    for i in range(len(g)):
        out[i].index_add_(0, ids[i], g[i])
    if padding_idx is not None:
        out[:, padding_idx] = 0
    return Gradients(out, None)


def _edots(s1, s2, *, num_embeddings, padding_idx=None, summed=False, backend=None):
    x = _egrads(*s1, num_embeddings=num_embeddings, padding_idx=padding_idx).weight.flatten(1)
    y = _egrads(*s2, num_embeddings=num_embeddings, padding_idx=padding_idx).weight.flatten(1)
    return x @ y.sum(0) if summed else x @ y.T


embedding = SimpleNamespace(
    grads=_egrads,
    dots=_edots,
    sqnorms=lambda ids, G, **k: _egrads(ids, G, **k).weight.square().sum((1, 2)),
    weighted_sum=lambda ids, G, w, **k: Gradients(
        torch.tensordot(w.to(_acc(G).dtype), _egrads(ids, G, **k).weight, 1).to(G.dtype), None
    ),
    project=lambda ids, G, projection, **k: _proj(_egrads(ids, G, **k).weight, projection),
)


def _cgrads(A, G, *, kernel_size, stride=1, padding=0, dilation=1, groups=1, bias=False, backend=None):
    n = A.dim() - 2
    tup = lambda v: (v,) * n if isinstance(v, int) else tuple(v)
    a, g = _acc(A), _acc(G)
    rows = []
    for i in range(len(a)):
        w = a.new_zeros(g.shape[1], a.shape[1] // groups, *tup(kernel_size))
        rows.append(
            torch.ops.aten.convolution_backward(
                g[i : i + 1],
                a[i : i + 1],
                w,
                None,
                tup(stride),
                tup(padding),
                tup(dilation),
                False,
                (0,) * n,
                groups,
                (False, True, False),
            )[1]
        )
    return Gradients(torch.stack(rows), g.flatten(2).sum(2) if bias else None)


def _cdots(s1, s2, *, summed=False, **k):
    x = _cgrads(*s1, **k).weight.flatten(1)
    y = _cgrads(*s2, **k).weight.flatten(1)
    return x @ y.sum(0) if summed else x @ y.T


conv = SimpleNamespace(
    grads=_cgrads,
    dots=_cdots,
    sqnorms=lambda A, G, **k: _cgrads(A, G, **k).weight.flatten(1).square().sum(1),
    weighted_sum=lambda A, G, w, **k: Gradients(
        torch.tensordot(w.to(_acc(G).dtype), _cgrads(A, G, **k).weight, 1).to(G.dtype), None
    ),
    project=lambda A, G, projection, **k: _proj(_cgrads(A, G, **k).weight, projection),
)


def _ngrads(X, G, *, kind="layer", eps, num_groups=None, normalized_shape=None, bias=False, backend=None):
    x, g = _acc(X), _acc(G)
    if kind == "group":
        xh = F.group_norm(x, num_groups, eps=eps)
        return Gradients((xh * g).flatten(2).sum(2), g.flatten(2).sum(2) if bias else None)
    shape = tuple(normalized_shape)
    xh = F.layer_norm(x, shape, eps=eps) if kind == "layer" else F.rms_norm(x, shape, eps=eps)
    fold = lambda y: y.reshape(y.shape[0], -1, *shape).sum(1)
    return Gradients(fold(xh * g), fold(g) if bias else None)


norm = SimpleNamespace(grads=_ngrads)

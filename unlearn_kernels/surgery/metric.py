"""Inner products in the metric of Adam, and the projection onto what a span of gradients leaves free."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery_metric as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery.combine import combine_
from unlearn_kernels.surgery.gramian import gramian


def _fake(
    tensors: Sequence[Tensor], sets: int, seconds: Sequence[Tensor], scales: Tensor, eps: float
) -> Tensor:
    return tensors[0].new_empty((sets, sets), dtype=torch.float64)


def _triton(
    tensors: Sequence[Tensor], sets: int, seconds: Sequence[Tensor], scales: Tensor, eps: float
) -> Tensor:
    from unlearn_kernels.triton_kernels.surgery import metric as kernels

    return kernels.weighted_gramian(tensors, sets, seconds, scales, eps)


_ops.register_operator(
    "weighted_gramian",
    "surgery",
    "G_ab = sum g_a g_b / (sqrt(v) + eps) over lists of tensors",
    reference=reference.weighted_gramian,
    fake=_fake,
    triton=_triton,
)


def _corrections(steps: Sequence[float] | Tensor | None, beta2: float, like: Sequence[Tensor]) -> Tensor:
    """`1 / (1 - beta2^t)` of each tensor, float64; 1 without steps."""
    device = like[0].device
    if steps is None:
        return torch.ones(len(like), dtype=torch.float64, device=device)
    t = torch.as_tensor(steps, dtype=torch.float64, device=device)
    if t.shape not in ((), (len(like),)):
        raise ValueError(f"steps must be one number or one a tensor, {len(like)}, got shape {tuple(t.shape)}")
    return (1 / (1 - beta2**t)).expand(len(like)).contiguous()


def weighted_gramian(
    sets: Sequence[Sequence[Tensor]],
    second_moments: Sequence[Tensor],
    *,
    eps: float = 1e-8,
    beta2: float = 0.999,
    steps: Sequence[float] | Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Inner products of K gradients in the metric of Adam, in one pass.

    .. math:: G_{ab} = \sum_i \frac{a_i b_i}{\sqrt{v_i / (1 - \beta_2^t)} + \epsilon}

    Args:
        sets: K lists of N tensors, as `gramian` takes them.
        second_moments: N tensors `v >= 0` of the same shapes (`exp_avg_sq`); dtypes and strides may differ.
        eps: Adam's.
        beta2: Adam's; used where `steps` are given.
        steps: `t`, one number or one a tensor. Without it `v` is taken as corrected.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        (K, K) float64, symmetric, on the device of the tensors. Precision as of `gramian`; negative `v` give
        NaN, which like Inf passes through. Not differentiable.

    Raises:
        ValueError: if there is no set, or lengths, shapes, dtypes or devices do not fit.

    Scratch: `8 K (K + 1) / 2` bytes for every 16384 elements and `8192 (K + 3)` bytes a thread.

    Source: geometric unlearning (arXiv 2511.17100), github.com/Lemutisme/geo-unlearning.
    """
    if not sets:
        raise ValueError("sets must hold at least one list of tensors, got none")
    if not any(sets):
        return torch.zeros(len(sets), len(sets), dtype=torch.float64)
    names = [*_lists.names_of(sets), "second_moments"]
    call = _lists.kernel("weighted_gramian", backend, names, [*sets, second_moments])
    with torch.no_grad():
        scales = _corrections(steps, beta2, second_moments)
        return call([x for tensors in sets for x in tensors], len(sets), list(second_moments), scales, eps)


def _span_weights(G: Tensor) -> Tensor:
    """`(1, -c)` with `c` the coefficients, of least size, that make the remainder orthogonal to the rest.

    Directions are taken at unit length; what is dependent to six digits, beyond which float32 gradients
    have no inner products, counts as one direction.
    """
    finite = G.isfinite().all()
    size = G.diagonal()[1:].clamp(min=0).sqrt()
    unit = torch.where((size > 0) & finite, 1 / size, 0.0)
    C = torch.where(finite, G[1:, 1:], 0.0) * unit[:, None] * unit
    c = unit * (torch.linalg.pinv(C, rtol=1e-6, hermitian=True) @ (unit * torch.where(finite, G[1:, 0], 0.0)))
    c = torch.where(finite, c, torch.nan)
    return torch.cat([torch.ones_like(c[:1]), -c])


def project_span_(
    gradient: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    *,
    second_moments: Sequence[Tensor] | None = None,
    eps: float = 1e-8,
    beta2: float = 0.999,
    steps: Sequence[float] | Tensor | None = None,
    backend: Backend | None = None,
) -> Tensor:
    r"""Takes out of a gradient, in place, what lies in the span of others, in the plain or in Adam's metric.

    .. math:: g \leftarrow g - \sum_j c_j r_j \quad\text{with}\quad \langle r_i, g \rangle_H = 0
              \text{ for all } i, \qquad H = \operatorname{diag}(1 / (\sqrt{\hat v} + \epsilon))

    Without moments `H = I`: orthogonal gradient descent on stored gradients (OGD). With them a first-order
    step of Adam along `g` leaves the losses whose gradients are `r_i` alone (geometric unlearning). One pass
    reads the K + 1 lists (and `v`) for their Gramian, one reads them again and writes `g`.

    Args:
        gradient: N tensors, changed in place.
        directions: K lists of N tensors (the retain gradients; at least one), of any scale; some may depend
            on others.
        second_moments: N tensors as of `weighted_gramian`; None for the plain metric.
        eps: as of `weighted_gramian`.
        beta2: as of `weighted_gramian`.
        steps: as of `weighted_gramian`.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        The weights (K + 1,) float64: 1 and `-c`. NaN, which is then written, where an inner product is not finite.

    Raises:
        ValueError: as `gramian` and `combine_`, and if there is no direction.

    Scratch: that of the Gramian. The K equations are solved by an eigendecomposition, which on a GPU waits for it.

    Sources: OGD, Farajtabar et al. 2020 (arXiv 1910.07104); arXiv 2511.17100.
    """
    if not directions:
        raise ValueError("directions must hold at least one list of tensors, got none")
    sets = [gradient, *directions]
    if second_moments is None:
        G = gramian(sets, backend=backend)
    else:
        G = weighted_gramian(sets, second_moments, eps=eps, beta2=beta2, steps=steps, backend=backend)
    weights = _span_weights(G)
    combine_(sets, weights, backend=backend)
    return weights

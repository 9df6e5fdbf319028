"""Takes out of a forget gradient what works against the retain gradient."""

from collections.abc import Hashable, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from unlearn_kernels import _ops
from unlearn_kernels._backends import Backend
from unlearn_kernels.reference import surgery as reference
from unlearn_kernels.surgery import _lists
from unlearn_kernels.surgery._conflict_rules import SCOPES, ConflictScope, Rule, request

_NAMES: Final = ("forget", "retain")


class Conflict(NamedTuple):
    """What was found and done: all on the device of the gradients, so that looking is what costs a wait.

    S segments, as `gramian` makes them of a scope; the scope `global` has no such dimension, and for the scope
    `element` there are none (S = 0) but `rates`.

    Attributes:
        gramian: (S, 2, 2) float64, inner products of (forget, retain) before the projection.
        weights: (S, 2) float64, those of forget and retain in what was written; `(1, 0)` where nothing was.
        rates: (N,) float64 for the scope `element`, of each tensor that took part the share of elements of
            opposite signs; NaN for a skipped step. Otherwise (0,).
    """

    gramian: Tensor
    weights: Tensor
    rates: Tensor

    @property
    def cosine(self) -> Tensor:
        """The cosines between the two gradients before the projection, (S,) float64; 0 where either is zero."""
        G = self.gramian
        norms = G[..., 0, 0].sqrt() * G[..., 1, 1].sqrt()
        return torch.where(norms == 0, 0.0, G[..., 0, 1] / norms)

    @property
    def conflict_rate(self) -> Tensor:
        """The share of segments with a negative inner product, () float64; of elements, the mean of `rates`."""
        if self.gramian.dim() == 3 and len(self.gramian) == 0:
            return self.rates.mean()
        return (self.gramian[..., 0, 1] < 0).double().mean()

    @property
    def finite(self) -> Tensor:
        """Whether both gradients are, () bool: where not, `skip_nonfinite` has written nothing."""
        return self.gramian.isfinite().all() & ~self.rates.isnan().any()


def _fake(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rule: int,
    scope: int,
    groups: Sequence[int],
    options: Sequence[float],
    flags: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    element = scope == SCOPES["element"]
    leading = (0,) if element else (_lists.segments(scope, forget, groups),) if scope else ()
    shapes = (*leading, 2, 2), (*leading, 2), (len(forget) if element else 0,)
    gramian, weights, rates = (forget[0].new_empty(shape, dtype=torch.float64) for shape in shapes)
    return gramian, weights, rates


def _triton(
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    rule: int,
    scope: int,
    groups: Sequence[int],
    options: Sequence[float],
    flags: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from unlearn_kernels.triton_kernels import surgery as kernels

    return kernels.project_conflict_(forget, retain, rule, scope, groups, options, flags, seed)


_ops.register_operator(
    "project_conflict",
    "surgery",
    "f <- w_f f + w_r r over lists of tensors, by a rule on <f, f>, <f, r>, <r, r>, or element by element",
    reference=reference.project_conflict_,
    fake=_fake,
    triton=_triton,
    cuda=_ops.launcher("surgery", "project_conflict_", "cuda_kernels"),
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


def _nothing(scope: str) -> Conflict:
    """What no pairs make."""
    weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
    gramian, rates = torch.zeros(2, 2, dtype=torch.float64), weights[:0]
    return (
        Conflict(gramian, weights, rates)
        if scope == "global"
        else Conflict(gramian[:0].view(0, 2, 2), weights[:0].view(0, 2), rates)
    )


def project_conflict_(
    forget: Sequence[Tensor | None],
    retain: Sequence[Tensor | None],
    *,
    rule: Rule = "agem",
    scope: ConflictScope | None = None,
    groups: Sequence[Hashable] | None = None,
    gamma: float | None = None,
    alpha: float | None = None,
    eps: float | None = None,
    lam: float | None = None,
    cosine_clip: float | None = None,
    lower: bool | None = None,
    compat: bool | None = None,
    keep_retain: bool | None = None,
    leak: tuple[float, float] | None = None,
    seed: int | None = None,
    max_norm: float | None = None,
    max_result_norm: float | None = None,
    skip_nonfinite: bool = False,
    backend: Backend | None = None,
) -> Conflict:
    r"""Changes the forget gradient, in place, so that it no longer works against the retain gradient.

    The rules on inner products write `w_f f + w_r r` with weights from `<f, f>`, `<f, r>` and `<r, r>`; "in
    conflict" is `<f, r> < 0`. Without a conflict `agem`, `gru` and `doco` write nothing.

    ========  ========  =====================================================================================
    rule      scope     written, in conflict
    ========  ========  =====================================================================================
    agem      global    `gamma (f - <f, r> / (|r|^2 + eps) r) + alpha r`; gamma 1, alpha 0, eps 0
    pcgrad    global    `gamma (f - <f, r> / |r|^2 r) + alpha (r - <f, r> / |f|^2 f)`; gamma 1, alpha 1
    gru       global    `f - |f| max(cos, -cosine_clip) r / |r|`; cosine_clip inf
    blur      global    always `gamma f + alpha (r - <f, r> / (|f|^2 + eps) f)`, r where f is 0; with
                        lower=False `alpha (f - <f, r> / (|r|^2 + eps) r) + gamma r`; gamma 1, alpha 1, eps 0
    gdr_gma   tensor    `lam (f - <f, r> / |r|^2 r) + (1 - lam) (r - <f, r> / |f|^2 f)`; lam 0.5
    doco      tensor    `f - lam <f, r> / |r|^2 r`; lam 1
    sago      element   `alpha r` where signs differ, elsewhere `gamma f`, with keep_retain plus `alpha r`
    graddrop  element   by chance the positive or the negative numbers, `P = (1 + (f + r) / (|f| + |r|)) / 2`
    ========  ========  =====================================================================================

    Without a conflict `agem` and `pcgrad` write `gamma f + alpha r`, `gdr_gma` `lam f + (1 - lam) r`. With scope
    `element` they put 0 for the projection of two numbers of opposite signs: `agem` writes `alpha r` there,
    `pcgrad` 0, and both `gamma f + alpha r` elsewhere.

    Args:
        forget: N gradient tensors (float32, float64, bfloat16 or float16; any strides), changed in place.
            `None` leaves the pair out altogether: a parameter that does not forget takes no part.
        retain: N gradient tensors of the same shapes; dtypes and strides may differ. `None` counts as zero.
        rule: see above.
        scope: what one inner product goes over: `global`, all tensors; `group`, `tensor` and `row` as in
            `gramian`; `element`. By default the one in the table, which is the published one.
        groups: for the scope `group`, a label for each of the N tensors.
        gamma: what the forget gradient, projected, is multiplied by.
        alpha: what the retain gradient is multiplied by.
        eps: added to a squared norm that is divided by.
        lam: for `gdr_gma` the weight of the forget gradient, as published `1 / (1 + exp(100 (loss - 0.02)))` of
            the retain loss; for `doco` how much of the conflict is taken out.
        cosine_clip: for `gru`, a stronger conflict is taken out only in part; 0.5 where the published code clips.
        lower: for `blur`, which of its two levels is the lower one: True, as published, puts forgetting first.
        keep_retain: for `sago`, whether the retain gradient is added where signs agree.
        compat: `gdr_gma` and `doco` as their published code does it: `gdr_gma` projects `f` along the
            retain gradient it has just rectified, `lam (f - <f, r> / |r|^2 r') + (1 - lam) r'`; `doco` leaves a
            factor `|f|` out, `f - lam cos r / |r|` with `eps` (1e-8) added to both norms.
        leak: for `graddrop`, what a dropped number of (f, r) is multiplied by. 0 and 0.
        seed: for `graddrop`; the same numbers on every device.
        max_norm: both gradients are clipped to this norm (over all tensors) before the rule, each as
            `torch.nn.utils.clip_grad_norm_` does it, at no cost but a second pass for the narrow scopes.
        max_result_norm: what is written is clipped to this norm; the norm comes from the inner products.
        skip_nonfinite: nothing is written where an inner product over all tensors is NaN or infinite.
        backend: see `unlearn_kernels.use_backend`.

    Returns:
        A `Conflict`: inner products before the projection and weights, both float64, decided on the device. The
        weights are applied in double precision and each element rounded once, so that in float32 the cosine
        that is left by `agem` is below 1e-8; bfloat16 and float16 keep what their own rounding makes. A retain
        gradient of zero projects nothing. With `<f, r> >= 0`, infinity included, there is no conflict. Where
        `<f, r>` is NaN or `-inf` so is the weight, or NaN, and the formula's value is written: non-finite
        retain gradients are not hidden. Rules for elements compute in float32 (float64 where a tensor is).
        Not differentiable.

    Raises:
        ValueError: if lengths, shapes, dtypes or devices do not fit, `rule`, `scope`, `groups` or an option is
            unknown or does not fit, or a tensor of `forget` overlaps in memory with itself or another one.
            `forget[i]` and `retain[i]` may be one tensor.

    Streams of memory, K = 2 lists: 5 for `global` and `group` and with clipping or skipping, 3 for the others
    where a tensor's two gradients fit in the last-level cache; 2 where nothing is written.

    Scratch: 24 bytes for every 16384 elements, 64 bytes a segment and 32 KB a thread.

    Source: A-GEM, Chaudhry et al. 2019 (arXiv 1812.00420); PCGrad, Yu et al. 2020 (2001.06782); GRU,
    github.com/tmlr-group/GRU; BLUR, arXiv 2506.08164; GDR-GMA, github.com/RUIYUN-ML/GDR-GMA; DoCo, arXiv
    2405.15304; SAGO, arXiv 2604.14808; GradDrop, Chen et al. 2020 (2010.06808).
    """
    given = {
        "gamma": gamma, "alpha": alpha, "eps": eps, "lam": lam, "cosine_clip": cosine_clip, "lower": lower,
        "compat": compat, "keep_retain": keep_retain, "leak": leak, "seed": seed,
    }  # fmt: skip
    asked = request(rule, scope, given, max_norm, max_result_norm, skip_nonfinite)
    labels = _lists.group_numbers(asked.scope, groups, len(forget))
    fs, rs, kept = _pairs(forget, retain)
    if not fs:
        return _nothing(asked.scope)
    numbers = _lists.group_numbers(asked.scope, [labels[i] for i in kept] if labels else None, len(fs))
    call = _lists.kernel("project_conflict", backend, _NAMES, (fs, rs), kept)
    rest = asked.rule, SCOPES[asked.scope], numbers, list(asked.options), asked.flags, asked.seed
    with torch.no_grad():
        found = _lists.written(_NAMES, fs, rs, lambda: call(fs, rs, *rest), kept)
    return Conflict(*found)

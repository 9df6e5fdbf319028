"""Each rule against its published loop, in our words and in float64, and against its geometry."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.surgery.lists import agem, clones, flat, gradients
from unlearn_kernels import surgery
from unlearn_kernels.testing import randn, relative_error

SHAPES = ((40, 30), (30,), (7, 9, 2), (1,), (90, 33))
Lists = list[Tensor]
Loop = Callable[[Lists, Lists], Lists]


def opposed(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Lists, Lists]:
    """Tensors of which every other pair conflicts."""
    forget, retain = gradients(2, dtype, shapes=SHAPES, seed=seed)
    for i in (1, 3):
        if (forget[i].double() * retain[i].double()).sum() < 0:
            retain[i].neg_()
    return forget, retain


def clipped(tensors: Lists, max_norm: float) -> Lists:
    """What torch makes of them."""
    parameters = [torch.zeros_like(x).requires_grad_() for x in tensors]
    for p, x in zip(parameters, tensors, strict=True):
        p.grad = x.clone()
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    return [p.grad for p in parameters]


def doco(forget: Lists, retain: Lists) -> Lists:
    """Yongliang Wu et al.: clip both to 1; a tensor at a time a cosine, and no norm of the forget gradient."""
    out = []
    for a, b in zip(clipped(forget, 1.0), clipped(retain, 1.0), strict=True):
        a_unit, b_unit = a / (a.norm() + 1e-8), b / (b.norm() + 1e-8)
        s = (a_unit * b_unit).sum()
        out.append(a - 1.0 * s * b_unit if s < 0 else a)
    return out


def doco_corrected(forget: Lists, retain: Lists) -> Lists:
    pairs = zip(clipped(forget, 1.0), clipped(retain, 1.0), strict=True)
    return [agem(a.flatten(), b.flatten()).view_as(a) if (a * b).sum() < 0 else a for a, b in pairs]


def gdr(compat: bool) -> Loop:
    """GDR-GMA, without its memory bank: retain is rectified first and the forget gradient along what became of it."""

    def loop(forget: Lists, retain: Lists) -> Lists:
        out, lam = [], 1 / (1 + 2.718281828459045 ** (100 * (0.025 - 0.02)))
        for y, x in zip(forget, retain, strict=True):
            dot, old = (x * y).sum(), x
            if dot < 0:
                x = x - dot / y.square().sum() * y
                y = y - dot / old.square().sum() * (x if compat else old)
            out.append((1 - lam) * x + lam * y)
        return out

    return loop


def gru(clip: float | None) -> Loop:
    """GRU: on one long vector, only in conflict, a cosine that is not let below -clip."""

    def loop(forget: Lists, retain: Lists) -> Lists:
        f, r = flat(forget), flat(retain)
        cosine = f @ r / (f.norm() * r.norm())
        limited = cosine if clip is None else cosine.clamp(min=-clip)
        step = f - f.norm() * limited / r.norm() * r if cosine < 0 else f
        return list(step.split([x.numel() for x in forget]))

    return loop


def blur(forget: Lists, retain: Lists) -> Lists:
    """BLUR as it ran: gamma fixed to 1, forgetting at the lower level, no test of the sign, no clip of the result."""
    f, r = flat(forget), flat(retain)
    return [r + (1.0 - r @ f / f.norm() ** 2) * f]


def blur_upper(forget: Lists, retain: Lists) -> Lists:
    f, r = flat(forget), flat(retain)
    return [f + (0.5 - r @ f / r.norm() ** 2) * r]


def blur_of_sago(forget: Lists, retain: Lists) -> Lists:
    f, r = flat(forget), flat(retain)
    return [2.0 * f + 0.5 * (r - r @ f / (f @ f + 1e-10) * f)]


def pcgrad_of_sago(forget: Lists, retain: Lists) -> Lists:
    """SAGO's tensor by tensor strategy: one-sided with an epsilon, then the retain gradient on top."""
    out = []
    for f, r in zip(forget, retain, strict=True):
        dot = (f * r).sum()
        projected = f - dot / (r.square().sum() + 1e-10) * r if dot < 0 else f
        out.append(1.5 * projected + 0.7 * r)
    return out


def pcgrad(forget: Lists, retain: Lists) -> Lists:
    f, r = flat(forget), flat(retain)
    return [agem(f, r) + agem(r, f)]


LOOPS = {
    "doco published": (doco, {"rule": "doco", "compat": True, "max_norm": 1.0}),
    "doco corrected": (doco_corrected, {"rule": "doco", "max_norm": 1.0}),
    "gdr published": (gdr(True), {"rule": "gdr_gma", "compat": True, "lam": 0.3775406687981454}),
    "gdr two-sided": (gdr(False), {"rule": "gdr_gma", "lam": 0.3775406687981454}),
    "gru": (gru(None), {"rule": "gru"}),
    "gru clipped": (gru(0.1), {"rule": "gru", "cosine_clip": 0.1}),
    "blur": (blur, {"rule": "blur"}),
    "blur upper": (blur_upper, {"rule": "blur", "lower": False, "gamma": 0.5}),
    "blur of sago": (blur_of_sago, {"rule": "blur", "gamma": 2.0, "alpha": 0.5, "eps": 1e-10}),
    "pcgrad of sago": (
        pcgrad_of_sago,
        {"rule": "agem", "scope": "tensor", "gamma": 1.5, "alpha": 0.7, "eps": 1e-10},
    ),
    "pcgrad": (pcgrad, {"rule": "pcgrad"}),
}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("name", LOOPS)
def test_is_the_published_loop(name: str, backend: str) -> None:
    loop, options = LOOPS[name]
    forget, retain = opposed()
    expected, kept = flat(loop(forget, retain)), clones(retain)
    found = surgery.project_conflict_(forget, retain, **options, backend=backend)
    assert (found.gramian[..., 0, 1] < 0).any()
    assert relative_error(flat(forget), expected) < 1e-13
    assert all(torch.equal(a, b) for a, b in zip(retain, kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOOPS)
def test_of_lower_precision(name: str, dtype: torch.dtype) -> None:
    loop, options = LOOPS[name]
    forget, retain = opposed(dtype)
    expected = flat(loop([x.double() for x in forget], [x.double() for x in retain]))
    surgery.project_conflict_(forget, retain, **options)
    assert relative_error(flat(forget), expected) < 1.1 * relative_error(expected.to(dtype), expected) + 1e-7


@pytest.mark.parametrize("size", [0.05, 0.2, 1.0, 5.0])
def test_docos_missing_norm(size: float) -> None:
    """The published subtraction is right for gradients of norm 1 only; the corrected one always."""
    f, r = randn(1000).double(), randn(1000, seed=1).double() - 0.3 * randn(1000).double()
    f *= size / f.norm()

    def after(compat: bool) -> float:
        g = f.clone()
        surgery.project_conflict_([g], [r], rule="doco", compat=compat)
        return float(g @ r / (g.norm() * r.norm()))

    assert abs(after(False)) < 1e-12
    if size == 1.0:
        assert abs(after(True)) < 1e-7
    elif size < 1.0:
        assert after(True) > 0.5
    else:
        assert after(True) < -0.1


def test_gdrs_leftover() -> None:
    """Rectifying along what has been rectified leaves <f', r> = <f, r> cos^2."""
    f, r = randn(500).double(), randn(500, seed=1).double() - 0.4 * randn(500).double()
    dot, cosine = f @ r, f @ r / (f.norm() * r.norm())
    g = f.clone()
    surgery.project_conflict_([g], [r], rule="gdr_gma", compat=True, lam=1.0)
    assert abs(g @ r - dot * cosine**2) < 1e-10
    surgery.project_conflict_([f], [r], rule="gdr_gma", lam=1.0)
    assert abs(f @ r) < 1e-10


@pytest.mark.parametrize("rule", ["agem", "pcgrad", "gru", "blur", "gdr_gma", "doco"])
def test_both_clips(rule: str) -> None:
    forget, retain = opposed()
    a, b = clipped(forget, 0.8), clipped(retain, 0.8)
    surgery.project_conflict_(a, b, rule=rule)
    expected = flat(a) * min(1.0, 0.3 / (float(flat(a).norm()) + 1e-6))
    surgery.project_conflict_(forget, retain, rule=rule, max_norm=0.8, max_result_norm=0.3)
    assert relative_error(flat(forget), expected) < 1e-12
    assert abs(flat(forget).norm() - min(0.3, flat(a).norm())) < 1e-5


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_a_clip_alone_scales_what_does_not_conflict(scope: str) -> None:
    x = [randn(100, dtype=torch.float64), randn(3, dtype=torch.float64)]
    norm = flat(x).norm()
    y, r = clones(x), [torch.full_like(v, torch.nan) for v in x]
    found = surgery.project_conflict_(y, x, scope=scope, max_norm=0.5)
    assert relative_error(flat(y), 0.5 / (norm + 1e-6) * flat(x)) < 1e-13
    assert (found.weights[..., 1] == 0).all()
    assert flat(r).isnan().all()


@pytest.mark.parametrize("scope", ["global", "tensor", "row", "element"])
@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_step_that_is_not_finite_is_skipped(scope: str, where: str, backend: str) -> None:
    forget, retain = opposed(torch.float32)
    before = clones(forget)
    options = {"rule": "sago"} if scope == "element" else {"scope": scope}
    kept = surgery.project_conflict_(clones(forget), retain, **options, skip_nonfinite=True, backend=backend)
    assert kept.finite
    (forget if where == "forget" else retain)[2][0, 0, 1] = torch.inf if where == "forget" else torch.nan
    changed = clones(forget)
    found = surgery.project_conflict_(changed, retain, **options, skip_nonfinite=True, backend=backend)
    assert not found.finite
    assert all(torch.equal(a, b) for i, (a, b) in enumerate(zip(before, changed, strict=True)) if i != 2)
    assert torch.equal(changed[2], forget[2])
    if scope != "element":
        assert (found.weights == torch.tensor([1.0, 0.0])).all()


@pytest.mark.parametrize("rule", ["agem", "pcgrad", "gru", "blur", "gdr_gma", "doco"])
@pytest.mark.parametrize("zero", ["forget", "retain", "both"])
def test_zeros_are_divided_by_nowhere(rule: str, zero: str) -> None:
    f, r = randn(50), randn(50, seed=1)
    for name, x in (("forget", f), ("retain", r)):
        if zero in (name, "both"):
            x.zero_()
    for compat in (False, True) if rule in ("gdr_gma", "doco") else (None,):
        found = surgery.project_conflict_([f.clone()], [r], rule=rule, compat=compat)
        assert found.weights.isfinite().all()


def test_options_belong_to_their_rules() -> None:
    x = [randn(3)]
    cases = [
        ("scope of sago must be 'element', got 'global'", {"rule": "sago", "scope": "global"}),
        ("scope of doco must be 'tensor' or .*, got 'element'", {"rule": "doco", "scope": "element"}),
        ("lam is no option of rule 'agem', which has gamma, alpha, eps", {"lam": 0.5}),
        ("compat is no option of rule 'gru'", {"rule": "gru", "compat": True}),
        ("cosine_clip must not be negative, got -0.5", {"rule": "gru", "cosine_clip": -0.5}),
        ("max_norm must be positive, got 0", {"max_norm": 0.0}),
        ("max_result_norm must be positive, got nan", {"max_result_norm": float("nan")}),
        ("not for scope 'element'", {"rule": "sago", "max_norm": 1.0}),
    ]
    for message, options in cases:
        with pytest.raises(ValueError, match=message):
            surgery.project_conflict_(x, x, **options)

import copy

import pytest
import torch
from torch import Tensor

from tests.surgery.lists import agem, clones, flat, gradients
from unlearn_kernels import surgery
from unlearn_kernels.reference.surgery_adamw import stochastically
from unlearn_kernels.surgery import SurgicalAdamW
from unlearn_kernels.testing import at_threads, randn, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = ((37, 129), (1,), (0, 3), (), (20_011,))


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [randn(*s, seed=50 + i, dtype=dtype) for i, s in enumerate(SHAPES)]


def exact_steps(
    params: list[Tensor], steps: list[tuple[list[Tensor], list[Tensor]]], **settings: float
) -> list[Tensor]:
    """The definition in float64: project, then torch's AdamW."""
    made = [p.double() for p in params]
    optimizer = torch.optim.AdamW(made, **settings)
    for forget, retain in steps:
        g = agem(flat(forget), flat(retain)).split([p.numel() for p in made])
        for p, part in zip(made, g, strict=True):
            p.grad = part.view(p.shape).clone()
        optimizer.step()
    return made


def conflicts(count: int, dtype: torch.dtype) -> list[tuple[list[Tensor], list[Tensor]]]:
    return [tuple(gradients(2, dtype, shapes=SHAPES, seed=1000 * i)) for i in range(count)]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "settings", [{}, {"lr": 0.05, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3}]
)
def test_is_surgery_and_then_adamw(dtype: torch.dtype, backend: str, settings: dict) -> None:
    params, steps = parameters(dtype), conflicts(3, dtype)
    exact = exact_steps(params, steps, **settings)
    optimizer = SurgicalAdamW(params, backend=backend, **settings)
    theirs = clones(params)
    eager = torch.optim.AdamW(theirs, fused=True, **settings)
    before = clones(params)
    for forget, retain in steps:
        kept = clones(forget), clones(retain)
        optimizer.step(forget=forget, retain=retain)
        assert torch.equal(flat(kept[0]), flat(forget))
        assert torch.equal(flat(kept[1]), flat(retain))
        assert optimizer.conflict.cosine < -0.2
        surgery.project_conflict_(kept[0], kept[1])
        for p, g in zip(theirs, kept[0], strict=True):
            p.grad = g
        eager.step()
    moved = flat(exact) - flat(before)
    ours, plain = (relative_error(flat(p) - flat(before), moved) for p in (params, theirs))
    assert ours <= 1.2 * plain + torch.finfo(dtype).eps
    assert all(optimizer.state[p]["step"] == 3 for p in params)


def test_same_gradient_as_combine_into_float32() -> None:
    """With beta 0 the first moment is the combined gradient: bit for bit what `combine` makes of float32 ones."""
    for dtype, bound in ((torch.float32, 0.0), (torch.bfloat16, 1e-7)):
        (forget, retain), params = conflicts(1, dtype)[0], parameters()
        optimizer = SurgicalAdamW(params, betas=(0.0, 0.0))
        optimizer.step(forget=forget, retain=retain)
        expected = [torch.zeros(x.shape) for x in forget]
        surgery.combine_([expected, forget, retain], [0.0, *optimizer.conflict.weights.tolist()])
        found = flat([optimizer.state[p]["exp_avg"] for p in params])
        assert relative_error(found, flat(expected)) <= bound


def test_bfloat16_keeps_a_small_correction() -> None:
    """|cos| = 1e-3 lies below bfloat16's resolution; the moments in float32 are free of the conflict."""
    f = randn(100_000)
    r = (randn(100_000, seed=1) - 1e-3 * f).bfloat16()
    f, p = f.bfloat16(), torch.zeros(100_000, dtype=torch.bfloat16)
    optimizer = SurgicalAdamW([p], betas=(0.0, 0.0), moments=torch.float32)
    before = f.double() @ r.double() / (f.double().norm() * r.double().norm())
    r = r if before < 0 else -r
    optimizer.step(forget=[f], retain=[r])
    g = optimizer.state[p]["exp_avg"].double()
    assert abs(g @ r.double() / (g.norm() * r.double().norm())) < 1e-8
    assert abs(before) > 1e-4


@pytest.mark.parametrize(
    ("param", "moments", "gradient"),
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, None, torch.bfloat16),
        (torch.float16, torch.float32, torch.float16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float64, None, torch.float32),
    ],
)
def test_mixed_types(param: torch.dtype, moments: torch.dtype | None, gradient: torch.dtype) -> None:
    params, steps = parameters(param), conflicts(2, gradient)
    exact = exact_steps(params, steps)
    optimizer = SurgicalAdamW(params, moments=moments)
    for forget, retain in steps:
        optimizer.step(forget=forget, retain=retain)
    assert all(optimizer.state[p]["exp_avg"].dtype == (moments or param) for p in params)
    tolerance = 2 * torch.finfo(param).eps if param != torch.float64 else 1e-12
    assert relative_error(flat(params), flat(exact)) < tolerance


def test_groups_differ_and_one_goes_up() -> None:
    params, (step,) = parameters(), conflicts(1, torch.float32)
    before = clones(params)
    groups = [
        {"params": params[:2], "lr": 0.1, "weight_decay": 0.0},
        {"params": params[2:], "maximize": True, "betas": (0.5, 0.6), "eps": 1e-3},
    ]
    optimizer = SurgicalAdamW(groups, lr=torch.tensor(0.01))
    optimizer.step(forget=step[0], retain=step[1])
    g = agem(flat(step[0]), flat(step[1])).split([p.numel() for p in params])
    theirs = [p.double() for p in before]
    for p, part in zip(theirs, g, strict=True):
        p.grad = part.view(p.shape).clone()
    groups = [{**groups[0], "params": theirs[:2]}, {**groups[1], "params": theirs[2:]}]
    torch.optim.AdamW(groups, lr=0.01).step()
    assert relative_error(flat(params), flat(theirs)) < 2e-7


def test_gradients_per_parameter_and_those_that_are_none() -> None:
    forget, retain = conflicts(1, torch.float32)[0]
    listed, by_name, attached = parameters(), parameters(), parameters()
    first = SurgicalAdamW(listed)
    first.step(forget=[None, *forget[1:]], retain=[*retain[:4], None])
    second = SurgicalAdamW(by_name)
    second.step(
        forget=dict(zip(by_name[1:], forget[1:], strict=True)),
        retain=dict(zip(by_name[:4], retain, strict=False)),
    )
    third = SurgicalAdamW(attached)
    for p, r in zip(attached[:4], retain, strict=False):
        p.grad = r
    third.take_retain()
    assert all(p.grad is None for p in attached)
    for p, f in zip(attached[1:], forget[1:], strict=True):
        p.grad = f
    third.step()
    assert torch.equal(listed[0], parameters()[0])
    assert first.state[listed[0]] == {}
    assert torch.equal(flat(listed), flat(by_name))
    assert torch.equal(flat(listed), flat(attached))
    kept = torch.zeros_like(forget[4])
    exact = agem(flat(forget[1:]), flat([*retain[1:4], kept]))
    assert relative_error(flat([first.state[p]["exp_avg"] for p in listed[1:]]), 0.1 * exact) < 1e-6
    with pytest.raises(ValueError, match="retain must be given"):
        third.step()


@pytest.mark.parametrize("where", ["forget", "retain"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_is_skipped(where: str, value: float) -> None:
    params, (first, second) = parameters(), conflicts(2, torch.float32)
    optimizer = SurgicalAdamW(params)
    optimizer.step(forget=first[0], retain=first[1])
    before = copy.deepcopy(optimizer.state_dict()), clones(params)
    (second[0] if where == "forget" else second[1])[4][77] = value
    optimizer.step(forget=second[0], retain=second[1])
    assert torch.equal(flat(params), flat(before[1]))
    for i, state in before[0]["state"].items():
        assert all(torch.equal(x, optimizer.state_dict()["state"][i][k]) for k, x in state.items())


def test_weights_may_be_given_or_made_by_any_rule() -> None:
    forget, retain = conflicts(1, torch.float32)[0]
    given, ruled = parameters(), parameters()
    SurgicalAdamW(given).step(forget=forget, retain=retain, weights=(0.5, 2.0))
    SurgicalAdamW(ruled, rule=lambda G: G.new_tensor([0.5, 2.0])).step(forget=forget, retain=retain)
    assert torch.equal(flat(given), flat(ruled))
    theirs = parameters()
    for p, f, r in zip(theirs, forget, retain, strict=True):
        p.grad = 0.5 * f + 2 * r
    torch.optim.AdamW(theirs).step()
    assert relative_error(flat(given), flat(theirs)) < 1e-6


def test_rules_by_name_and_parameters_with_one_gradient_only() -> None:
    forget, retain = conflicts(1, torch.float32)[0]
    params, theirs = parameters(), parameters()
    optimizer = SurgicalAdamW(params, rule="mean")
    optimizer.step(forget=[None, *forget[1:4], None], retain=[*retain[:4], None])
    assert torch.equal(optimizer.conflict.weights, torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert torch.equal(params[4], parameters()[4])
    for p, f, r in zip(theirs[:4], [torch.zeros_like(retain[0]), *forget[1:]], retain, strict=False):
        p.grad = 0.5 * f + 0.5 * r
    torch.optim.AdamW(theirs).step()
    assert relative_error(flat(params), flat(theirs)) < 1e-6


def test_a_gradient_of_weight_zero_is_not_read() -> None:
    forget, retain = conflicts(1, torch.float32)[0]
    retain[4][5] = torch.nan
    params = parameters()
    SurgicalAdamW(params).step(forget=forget, retain=retain, weights=(1.0, 0.0))
    assert flat(params).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_to_torchs_adamw_and_back(dtype: torch.dtype) -> None:
    steps = conflicts(3, dtype)
    ours, mixed = parameters(dtype), parameters(dtype)
    through = SurgicalAdamW(ours, lr=0.01)
    first = SurgicalAdamW(mixed, lr=0.01)
    for optimizer in (through, first):
        optimizer.step(forget=steps[0][0], retain=steps[0][1])
    theirs = torch.optim.AdamW(mixed, lr=0.5, fused=True)
    theirs.load_state_dict(first.state_dict())
    last = SurgicalAdamW(mixed, lr=0.5)
    last.load_state_dict(theirs.state_dict())
    assert last.param_groups[0]["lr"] == 0.01
    for optimizer in (through, last):
        optimizer.step(forget=steps[1][0], retain=steps[1][1])
    assert torch.equal(flat(ours), flat(mixed))
    assert {(k, v.dtype) for k, v in last.state[mixed[0]].items()} == {
        ("step", torch.float32),
        ("exp_avg", dtype),
        ("exp_avg_sq", dtype),
    }


def test_wide_moments_survive_saving() -> None:
    forget, retain = conflicts(1, torch.bfloat16)[0]
    params = parameters(torch.bfloat16)
    optimizer = SurgicalAdamW(params, moments=torch.float32)
    optimizer.step(forget=forget, retain=retain)
    other = SurgicalAdamW(clones(params), moments=torch.float32)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])
        assert other.state[q]["exp_avg"].dtype == torch.float32


def test_rounds_at_random_by_philox() -> None:
    forget, retain = conflicts(1, torch.bfloat16)[0]
    exact, params = [p.float() for p in parameters(torch.bfloat16)], parameters(torch.bfloat16)
    SurgicalAdamW(exact).step(forget=forget, retain=retain)
    SurgicalAdamW(params, moments=torch.float32, stochastic_rounding=True, seed=5).step(
        forget=forget, retain=retain
    )
    for place, (p, x) in enumerate(zip(params, exact, strict=True)):
        assert torch.equal(p, stochastically(x, 5, place, 1))


def test_rounding_at_random_is_right_on_average() -> None:
    x = torch.full((200_000,), 1 + 2.0**-10)  # an eighth of the way from 1 to the next bfloat16
    drawn = stochastically(x, 3, 0, 1)
    assert set(drawn.unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs(float((drawn > 1).double().mean()) - 0.125) < 0.003
    assert torch.equal(
        stochastically(torch.tensor([torch.inf, -torch.inf, 0.0]), 3, 0, 1),
        torch.tensor([torch.inf, -torch.inf, 0.0]).bfloat16(),
    )
    first, second = stochastically(x, 3, 0, 2), stochastically(x, 3, 1, 1)
    assert not torch.equal(first, drawn)
    assert not torch.equal(second, drawn)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_at_every_number_of_threads(dtype: torch.dtype, stochastic: bool) -> None:
    forget, retain = gradients(2, dtype, shapes=((300_000,), (100, 1000)))

    def run() -> Tensor:
        params = [randn(300_000, dtype=dtype), randn(100, 1000, dtype=dtype)]
        SurgicalAdamW(params, stochastic_rounding=stochastic).step(forget=forget, retain=retain)
        return flat(params)

    one, two, four = at_threads((1, 2, 4), run)
    assert torch.equal(one, two)
    assert torch.equal(one, four)


def test_strides_of_all_kinds() -> None:
    values = randn(40, 30), randn(40, 30, seed=1), -randn(40, 30) + randn(40, 30, seed=2)
    plain = [x.clone() for x in values]
    memory = torch.full((40, 50), 7.0)
    param = memory[:, 5:35].copy_(values[0])
    SurgicalAdamW([plain[0]]).step(forget=[plain[1]], retain=[plain[2]])
    optimizer = SurgicalAdamW([param])
    optimizer.step(
        forget=[values[1].T.contiguous().T], retain=[torch.stack([values[2], values[2]], -1)[..., 0]]
    )
    assert relative_error(param, plain[0]) < 1e-6
    assert (memory[:, :5] == 7).all()
    assert (memory[:, 35:] == 7).all()


def test_scaled_gradients() -> None:
    forget, retain = conflicts(1, torch.float32)[0]
    plain, scaled = parameters(), parameters()
    SurgicalAdamW(plain).step(forget=forget, retain=retain)
    optimizer = SurgicalAdamW(scaled)
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.step(forget=[1024 * x for x in forget], retain=[1024 * x for x in retain])
    assert relative_error(flat(scaled), flat(plain)) < 1e-7


def test_errors_name_the_argument() -> None:
    x = randn(5)
    for message, settings in (
        ("amsgrad is not supported", {"amsgrad": True}),
        ("rule must be .* got 'nonsense'", {"rule": "nonsense"}),
        ("lr must be at least 0, got -1", {"lr": -1}),
        ("betas must be at least 0 and less than 1", {"betas": (0.9, 1.0)}),
        ("eps must be at least 0", {"eps": -1e-8}),
        ("weight_decay must be at least 0", {"weight_decay": float("nan")}),
        ("seed must be at least 0", {"seed": -1}),
    ):
        with pytest.raises(ValueError, match=message):
            SurgicalAdamW([x], **settings)
    optimizer = SurgicalAdamW([x])
    with pytest.raises(ValueError, match="forget must have one entry a parameter, 1, got 2"):
        optimizer.step(forget=[x, x], retain=[x])
    with pytest.raises(ValueError, match=r"params\[0\] and retain\[0\] must have one shape"):
        optimizer.step(forget=[randn(5)], retain=[randn(4)], weights=(1.0, 1.0))
    with pytest.raises(
        ValueError, match=r"weights must be those of forget and retain, shape \(2,\), got \(3,\)"
    ):
        optimizer.step(forget=[randn(5)], retain=[randn(5)], weights=(1.0, 1.0, 1.0))
    y = randn(6)
    overlapping = SurgicalAdamW([y[:5]])
    with pytest.raises(ValueError, match=r"params\[0\] is written and overlaps in memory"):
        overlapping.step(forget=[y[1:]], retain=[randn(5)], weights=(1.0, 1.0))
    with pytest.raises(ValueError, match="state_dict has amsgrad"):
        optimizer.load_state_dict(torch.optim.AdamW([x], amsgrad=True).state_dict())

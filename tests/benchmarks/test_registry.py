from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import gradient_sets, registry
from benchmarks.check import operators_without_case
from benchmarks.registry import Call, Case, Provider

OPERATORS = (
    "linear_sqnorms",
    "conv_sqnorms",
    "conv_dots",
    "conv_grads",
    "embedding_sqnorms",
    "embedding_dots",
    "embedding_weighted_sum",
    "norm_sqnorms",
    "norm_grads",
    "lm_head_sqnorms",
    "lm_head_dots",
    "lm_head_tied_dots",
    "gramian",
    "combine",
    "project_conflict",
    "topk_mask",
    "apply_mask",
    "surgical_adamw",
    "weighted_gramian",
    "compress",
    "decompress",
    "project_conflict_compressed",
    "rademacher_project",
    "normal_project",
    "dense_adjoint",
    "sparse_project",
    "hadamard_project",
    "tensor_sketch",
    "squared_gradients",
    "squared_rows",
    "covariance",
    "topk",
    "encode_rows",
    "scan_rows",
    "scan_codes",
    "linear_nll",
    "linear_stats",
    "linear_maxmean",
    "linear_kl",
    "linear_soft_ce",
    "linear_softplus",
)


def test_every_first_operator_has_a_case() -> None:
    assert operators_without_case(OPERATORS) == []
    assert operators_without_case(["linear_nll", "no_such_operator"]) == ["no_such_operator"]


@pytest.mark.parametrize("case", registry.all_cases(), ids=lambda case: case.name)
def test_cases_are_complete(case: Case) -> None:
    assert case.flops > 0
    assert case.bytes > 0
    assert [p.role for p in case.providers].count("ours") == 1
    assert case.warm is None or case.warm.flops < case.flops
    assert case.warm is None or [p.name for p in case.warm.providers if p.role == "ours"]


def test_every_operator_has_a_small_case() -> None:
    small = {op for case in registry.select(["/small/"]) for op in case.ops}
    assert small == set(OPERATORS)


def test_selection_by_part_and_by_glob() -> None:
    assert {c.ops for c in registry.select(["surgery.gramian"])} == {("gramian",)}
    assert [c.name for c in registry.select(["topk/s*/float32"])] == ["influence.topk/small/float32"]
    assert {c.ops for c in registry.select(["surgery.gramian", "topk/"])} == {("gramian",), ("topk",)}
    assert registry.select([]) == registry.all_cases()
    with pytest.raises(ValueError, match="no case matches 'nonsense'"):
        registry.select(["topk", "nonsense"])


def test_names_are_unique(make_case: Callable[..., Case]) -> None:
    existing = registry.all_cases()[0]
    with pytest.raises(ValueError, match="is registered already"):
        registry.register(make_case(name=existing.name))
    twice = Provider("ours", lambda x: Call(lambda: x), "ours")
    with pytest.raises(ValueError, match="names must differ"):
        make_case(twice, twice)
    with pytest.raises(ValueError, match="none with role 'ours'"):
        make_case(Provider("peer", lambda x: Call(lambda: x)))


def test_gradient_sets_have_the_published_sizes() -> None:
    gpt2, lora = gradient_sets.gpt2(), gradient_sets.lora()
    assert (len(gpt2), gradient_sets.elements(gpt2)) == (148, 124_439_808)
    assert (len(lora), gradient_sets.elements(lora)) == (448, 39_976_960)


def test_gradient_sets_conflict_and_restore() -> None:
    sets = gradient_sets.make(((30, 20), (7,)), 3, torch.float32)("cpu")
    gramian = gradient_sets.gramian(sets)
    assert gramian[0, 1] < 0
    assert gramian[0, 2] < 0
    sets.work[0].zero_()
    sets.restore()
    assert all(torch.equal(a, b) for a, b in zip(sets.work, sets.sets[0], strict=True))
    weights = torch.tensor([1.0, 0.5, -2.0])
    result = [
        sum(w * t for w, t in zip(weights, group, strict=True)) for group in zip(*sets.sets, strict=True)
    ]
    assert gradient_sets.deviation(sets, result, weights) < 1e-6
    assert gradient_sets.deviation(sets, sets.work, weights) > 0.1

"""Every operator has all its layers: schema, reference, fake, samples, documentation row, benchmark case."""

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from unlearn_kernels import _loader
from unlearn_kernels._backends import BACKENDS, FLOATS, REGISTRY, Operator
from unlearn_kernels._ops import NAMESPACE
from unlearn_kernels._samples import SAMPLES, results
from unlearn_kernels.testing import assert_as_exact_as, randn

pytestmark = pytest.mark.skipif(not _loader.have_C, reason="the extension is not built")
ROOT = Path(__file__).parents[1]
NOT_OPERATORS = {"isa", "find_clash", "datainf_scores", "cholesky_update"}

Arguments = tuple[Any, ...]
OPERATORS = pytest.mark.parametrize("operator", REGISTRY.values(), ids=list(REGISTRY))


def sample(name: str) -> Arguments:
    """An operator's sample, no two tensors of which share memory."""
    assert name in SAMPLES, f"unlearn_kernels/_samples.py has no sample of {name}"
    return tree_map_only(Tensor, torch.clone, SAMPLES[name](torch.float32, "cpu"))


def linear_nll_backward() -> Arguments:
    h, weight, bias, labels, *settings = sample("linear_nll")
    lse, kept = raw("linear_nll_forward")(h, weight, bias, labels, *settings, 60)[1:]
    return randn(len(h), seed=3), h, weight, bias, labels, lse, kept, *settings, True, True


def linear_nll_sweep() -> Arguments:
    arguments = sample("linear_nll")
    return randn(len(arguments[0]), seed=3), *arguments, True


def scan_rows() -> Arguments:
    queries, rows, k, _ = sample("topk")
    return queries, rows, k, 3


def linear_rows() -> Arguments:
    return sample("linear_kl")[:-2]


def linear_rows_backward() -> Arguments:
    arguments = linear_rows()
    fields, argmax = raw("linear_rows_forward")(*arguments)
    return randn(*fields.shape, seed=6), fields, argmax, *arguments, True, True


def linear_rows_sweep() -> Arguments:
    arguments = linear_rows()
    return torch.ones_like(raw("linear_rows_forward")(*arguments)[0]), *arguments, True


# Raw operators that a public one is made of, or that have no reference: the others take its sample.
PARTS = {
    "scan_rows": scan_rows,
    "linear_nll_forward": lambda: (*sample("linear_nll"), 60),
    "linear_nll_backward": linear_nll_backward,
    "linear_nll_sweep": linear_nll_sweep,
    "linear_rows_forward": linear_rows,
    "linear_rows_backward": linear_rows_backward,
    "linear_rows_sweep": linear_rows_sweep,
}
WHOLE = {name: o.impls["cpp"].call for name, o in REGISTRY.items()}
RAW = {
    **{
        call.name().split("::")[1]: partial(sample, name)
        for name, call in WHOLE.items()
        if isinstance(call, OpOverload)
    },
    **PARTS,
}
# Public operators that are Python over raw ones.
COMPOSED = {name: partial(sample, name) for name, call in WHOLE.items() if not isinstance(call, OpOverload)}
_ROWS = (0, 3, 6)
# The arguments whose first dimension (or another, if named) is the one that may be empty.
EMPTIED = {
    "linear_sqnorms": (0, 1),
    "linear_dots": (0, 1),
    "linear_weighted_sum": (0, 1, 2),
    "linear_grads": (0, 1),
    "linear_two_sided": (0, 1),
    "linear_sketch": (0, 1),
    "embedding_sqnorms": (0, 1),
    "embedding_dots": (0, 1, 2, 3),
    "embedding_weighted_sum": (0, 1, 2),
    "norm_sqnorms": (0, 1),
    "norm_grads": (0, 1),
    "conv_sqnorms": (0, 1),
    "conv_dots": (0, 1),
    "conv_grads": (0, 1),
    "lm_head_sqnorms": (0, 1, 2),
    "lm_head_dots": (0, 1, 2),
    "lm_head_tied_dots": (0, 1, 2, 3, 4),
    "gramian": (0,),
    "combine_": (0, 1),
    "project_conflict_": (0, 1),
    "topk_mask": (),
    "apply_mask_": (0, 1),
    "surgical_adamw_": (0, 1, 2, 4),
    "weighted_gramian": (0, 2),
    "compress": (0,),
    "decompress_": (0, 1, 2),
    "project_conflict_compressed_": (0, 1, 2),
    "rademacher_project": (0,),
    "normal_project": (0,),
    "dense_adjoint": (0,),
    "sparse_project": (0,),
    "hadamard_project": (0,),
    "tensor_sketch": (0, 1),
    "squared_gradients": (0, 1),
    "squared_rows": (0,),
    "covariance": (0,),
    "encode_rows": (0,),
    "topk": (0,),
    "scan_rows": (0,),
    "scan_codes": (0, 1),
    "linear_nll_forward": (0, 3),
    "linear_nll_backward": (0, 1, 4, 5),
    "linear_nll_sweep": (0, 1, 4),
    "linear_rows_forward": _ROWS,
    "linear_rows_backward": ((0, 1), (1, 1), 3, 6, 9),
    "linear_rows_sweep": ((0, 1), 1, 4, 7),
    "linear_nll": (0, 3),
    "linear_stats": _ROWS,
    "linear_maxmean": _ROWS,
    "linear_kl": _ROWS,
    "linear_soft_ce": _ROWS,
    "linear_softplus": _ROWS,
}
RAW_OPERATORS = pytest.mark.parametrize("name", RAW)


def raw(name: str) -> OpOverload:
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def contiguous(name: str) -> Arguments:
    return {**RAW, **COMPOSED}[name]()


def permuted(name: str) -> Arguments:
    """The same numbers with the dimensions in the opposite order in memory."""

    def reordered(x: Tensor) -> Tensor:
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)

    return tree_map_only(Tensor, reordered, contiguous(name))


def strided(name: str) -> Arguments:
    """The same numbers with gaps between those of a matrix."""

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(2, dim=-1)[..., ::2] if x.dim() > 1 else x

    return tree_map_only(Tensor, spread, contiguous(name))


def empty(name: str) -> Arguments:
    """No samples, rows or tokens."""
    arguments = list(contiguous(name))
    assert name in EMPTIED, f"EMPTIED must tell which arguments of {name} may be empty"
    for entry in EMPTIED[name]:
        index, dim = entry if isinstance(entry, tuple) else (entry, 0)
        arguments[index] = tree_map_only(Tensor, lambda x, dim=dim: x.narrow(dim, 0, 0), arguments[index])
    return tuple(arguments)


LAYOUTS = pytest.mark.parametrize("layout", [contiguous, permuted, strided, empty], ids=lambda f: f.__name__)
Layout = Callable[[str], Arguments]


def test_every_schema_has_a_sample() -> None:
    schemas = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{NAMESPACE}::")}
    names = {n.removeprefix(f"{NAMESPACE}::") for n in schemas}
    of_cuda = {n for n in names if n.startswith("cuda_")}  # twins with the arguments of the others
    assert names - of_cuda - NOT_OPERATORS == set(RAW)
    assert {n.removeprefix("cuda_") for n in of_cuda} <= set(RAW)


@OPERATORS
def test_has_every_implementation(operator: Operator) -> None:
    assert {"reference", "cpp", "triton"} <= set(operator.impls) <= set(BACKENDS)
    assert importlib.import_module(f"unlearn_kernels.{operator.family}")
    assert operator.formula
    assert set(operator.impls["cpp"].dtypes) == set(FLOATS)


def sample_of(operator: Operator) -> str:
    """The name by which layouts know the sample of a public operator."""
    return operator.name if operator.name in COMPOSED else WHOLE[operator.name].name().split("::")[1]


@OPERATORS
@LAYOUTS
def test_kernel_equals_reference(operator: Operator, layout: Layout) -> None:
    name = sample_of(operator)

    def run(backend: str, arguments: Arguments) -> list[Tensor]:
        return results(operator.impls[backend].call, arguments, differentiable=operator.differentiable)

    actual, eager = run("cpp", layout(name)), run("reference", layout(name))
    exact = run("reference", tree_map_only(Tensor, doubled, layout(name)))
    for index, tensors in enumerate(zip(actual, exact, eager, strict=True)):
        floor = 4 * torch.finfo(torch.float32).eps if tensors[0].is_floating_point() else 0.0
        assert_as_exact_as(f"result {index}", *tensors, floor=floor)


def doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@RAW_OPERATORS
@LAYOUTS
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_has_the_real_shapes(name: str, layout: Layout, device: str) -> None:
    arguments = layout(name)
    with FakeTensorMode():

        def fake(x: Tensor) -> Tensor:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device)

        faked = tree_leaves(raw(name)(*tree_map_only(Tensor, fake, arguments)))
    real = tree_leaves(raw(name)(*arguments))
    assert [(f.shape, f.dtype, f.device.type) for f in faked if f is not None] == [
        (r.shape, r.dtype, device) for r in real if r is not None
    ]


@RAW_OPERATORS
@pytest.mark.parametrize("layout", [contiguous, permuted, empty], ids=lambda f: f.__name__)
def test_opcheck(name: str, layout: Layout) -> None:
    torch.library.opcheck(raw(name), layout(name))


@OPERATORS
def test_has_a_documentation_row(operator: Operator) -> None:
    pages = [page for page in (ROOT / "README.md", ROOT / "docs/operators.md") if page.exists()]
    rows = [row for page in pages for row in page.read_text().splitlines() if row.startswith("|")]
    assert any(f"`{operator.name}`" in row for row in rows), "run `make docs`"


@pytest.mark.skipif(not (ROOT / "benchmarks/registry.py").exists(), reason="no benchmarks here")
@OPERATORS
def test_has_a_benchmark_case(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    registry = importlib.import_module("benchmarks.registry")
    assert registry.cases_of(operator.name), f"benchmarks/cases measures no {operator.name}"

"""What every operator owes to torch: fakes, compilation, instruction sets, memory, backends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from tests.surgery.lists import agem, clones, flat, gradients
from unlearn_kernels import BackendError, _ops, surgery, use_backend
from unlearn_kernels._backends import REGISTRY
from unlearn_kernels.testing import relative_error

ROOT = Path(__file__).parents[2]
SHAPES = ((5, 3), (7,))


def arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    first, second = gradients(2, dtype, shapes=SHAPES)
    second[0] = second[0].T.contiguous().T
    return {
        "gramian": ([*first, *second], 2),
        "combine_": (first, [*first, *second], torch.tensor([0.5, 2.0], dtype=torch.float64)),
        "project_conflict_": (
            first,
            second,
            0,
            0,
            [],
            [1.0, 0.0, 0.0, 1.0, *[float("inf")] * 3, 0.0, 0.0],
            0,
            0,
        ),
    }[name]


@pytest.mark.parametrize("name", ["gramian", "combine_", "project_conflict_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(_ops.raw(name), arguments(name, dtype))


@pytest.mark.parametrize("name", ["gramian", "project_conflict_"])
def test_fakes_tell_shapes_and_dtypes(name: str) -> None:
    real = _ops.raw(name)(*arguments(name))
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        made = tree_map_only(Tensor, mode.from_tensor, arguments(name))
        fake = _ops.raw(name)(*made)
    pairs = zip(*([x] if isinstance(x, Tensor) else x for x in (real, fake)), strict=True)
    assert all((r.shape, r.dtype, r.device) == (f.shape, f.dtype, f.device) for r, f in pairs)


def test_compiles_whole() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(forget: list[Tensor], retain: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
        found = surgery.project_conflict_(forget, retain)
        surgery.combine_([forget, retain], weights)
        return (
            found.gramian,
            found.weights,
            surgery.gramian([forget, retain]),
            *surgery.combine([retain, forget], weights),
        )

    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    forget, retain = gradients(2)
    copies, kept = clones(forget), clones(retain)
    compiled = step(forget, retain, weights)
    eager = step._torchdynamo_orig_callable(copies, kept, weights)
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))
    assert torch.equal(flat(forget), flat(copies))
    assert not torch.equal(flat(forget), flat(gradients(1)[0]))


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    env = {**os.environ, "UNLEARN_KERNELS_ISA": isa}
    probe = "import torch, unlearn_kernels; print(torch.ops.unlearn_kernels.isa())"
    found = subprocess.run(
        [sys.executable, "-c", probe], env=env, capture_output=True, text=True, cwd=ROOT, check=False
    )
    if "this processor cannot run it" in found.stderr:
        pytest.skip(f"this processor has no {isa}")
    assert found.stdout.strip() == isa, found.stderr
    chosen = "float64 or mixed or odd_sizes or strides or in_range or halves or non_finite or as_defined"
    chosen += " or by_itself or loop"
    files = [
        f"tests/surgery/test_{name}.py" for name in ("gramian", "combine", "conflict", "scopes", "elements")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


MEMORY = """
import torch
from unlearn_kernels import surgery

def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])

torch.set_num_threads(2)
n, dtype = 20_000_000, getattr(torch, "{dtype}")
forget = [torch.full((n // 4,), 0.5, dtype=dtype) for _ in range(4)]
retain = [torch.full((n // 4,), -0.25, dtype=dtype) for _ in range(4)]
small = [torch.ones(500_000)], [-torch.ones(500_000)]  # enough to start the threads
surgery.project_conflict_(*small)
surgery.combine_(small, [1.0, 0.5])
open("/proc/self/clear_refs", "w").write("5")
before = peak()
assert surgery.project_conflict_(forget, retain).weights[1] == 2
surgery.combine_([forget, retain], [1.0, 0.5])
surgery.gramian([forget, retain])
print(peak() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_temporaries(dtype: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY.format(dtype=dtype)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # Partial sums take 30 kB, in a huge page (2 MB) of the heap where the system has them. A temporary as
    # large as one of the eight tensors would take 10 or 20 MB.
    assert int(done.stdout) < 4096


@pytest.mark.parametrize("name", ["gramian", "combine", "project_conflict"])
def test_backends_by_name(name: str) -> None:
    def call(backend: str | None) -> None:
        forget, retain = gradients(2, shapes=SHAPES)
        {
            "gramian": lambda: surgery.gramian([forget, retain], backend=backend),
            "combine": lambda: surgery.combine_([forget, retain], (1.0, 1.0), backend=backend),
            "project_conflict": lambda: surgery.project_conflict_(forget, retain, backend=backend),
        }[name]()

    assert set(REGISTRY[name].impls) == {"cpp", "reference", "triton", "cuda"}
    for backend in ("cpp", "reference", None):
        call(backend)
    with pytest.raises(
        BackendError, match=rf"{name}: backend 'triton' was requested but it .* Available here: cpp"
    ):
        call("triton")
    with (
        use_backend("cuda"),
        pytest.raises(BackendError, match=rf"{name}: backend 'cuda' was requested but"),
    ):
        call(None)
    with pytest.raises(ValueError, match="backend must be one of"):
        call("gpu")


def test_backends_agree() -> None:
    forget, retain = gradients(2)
    copies = clones(forget)
    ours, plain = (
        surgery.project_conflict_(f, retain, backend=b) for f, b in ((forget, "cpp"), (copies, "reference"))
    )
    assert relative_error(ours.gramian, plain.gramian) < 1e-6
    assert relative_error(flat(forget), flat(copies)) < 1e-7


@pytest.mark.parametrize("sets", [2, 3, 5])
def test_torchjds_gramian_and_weights(sets: int) -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    g = gradients(sets, torch.float64)
    G = surgery.gramian(g)
    J = torch.stack([flat(x) for x in g])
    assert relative_error(G, J @ J.T) < 1e-13
    weights = aggregation.MGDA().gramian_weighting(G)
    mean = aggregation.Mean()(J)
    ours = surgery.combine(g, [1 / sets] * sets)
    assert relative_error(flat(ours), mean) < 1e-12
    assert relative_error(flat(surgery.combine(g, weights)), aggregation.MGDA()(J)) < 1e-9


def test_torchjds_pcgrad_is_both_projections() -> None:
    aggregation = pytest.importorskip("torchjd.aggregation")
    first, second = gradients(2, torch.float64)
    expected = aggregation.PCGrad()(torch.stack([flat(first), flat(second)]))
    one, other = clones(first), clones(second)
    surgery.project_conflict_(one, second)
    surgery.project_conflict_(other, first)
    assert relative_error(flat(one) + flat(other), expected) < 1e-12
    assert relative_error(flat(one), agem(flat(first), flat(second))) < 1e-12

"""Which backend runs: argument, then `use_backend`, then the environment, then the default of the device."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import unlearn_kernels
from unlearn_kernels import BackendError, use_backend
from unlearn_kernels._backends import BACKENDS, REGISTRY, select
from unlearn_kernels.per_sample import linear
from unlearn_kernels.testing import randn

OPERATOR = "linear_sqnorms"
A, G = randn(2, 3, 5), randn(2, 3, 4, seed=1)
NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a CUDA device")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that run, in order."""
    names: list[str] = []
    operator = REGISTRY[OPERATOR]

    def spy(name: str) -> object:
        impl = operator.impls[name]

        def call(*args: object) -> Tensor:
            names.append(name)
            return impl.call(*args)

        return replace(impl, call=call)

    spied = replace(operator, impls={name: spy(name) for name in operator.impls})
    monkeypatch.setitem(REGISTRY, OPERATOR, spied)
    return names


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a process of its own."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


def test_default_of_the_cpu_is_cpp(ran: list[str]) -> None:
    linear.sqnorms(A, G)
    assert ran == ["cpp"]


def test_argument_beats_context_beats_default(ran: list[str]) -> None:
    with use_backend("reference"):
        linear.sqnorms(A, G)
        linear.sqnorms(A, G, backend="cpp")
        with use_backend("cpp"):
            linear.sqnorms(A, G)
        linear.sqnorms(A, G)
    linear.sqnorms(A, G)
    assert ran == ["reference", "cpp", "cpp", "reference", "cpp"]


def test_context_ends_with_an_exception(ran: list[str]) -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    linear.sqnorms(A, G)
    assert ran == ["cpp"]


def test_context_holds_for_every_thread(ran: list[str]) -> None:
    with use_backend("reference"), ThreadPoolExecutor(1) as pool:
        pool.submit(linear.sqnorms, A, G).result()
    assert ran == ["reference"]


SELECTED = """
import torch
from unlearn_kernels import use_backend
from unlearn_kernels._backends import REGISTRY, select
impls = REGISTRY["linear_sqnorms"].impls
def name(backend=None):
    call = select("linear_sqnorms", backend, (torch.ones(1),))
    return next(n for n, impl in impls.items() if impl.call == call)
print(name(), name("cpp"))
with use_backend("cpp"):
    print(name())
"""


def test_environment_beats_default() -> None:
    run = python(SELECTED, UNLEARN_KERNELS_BACKEND="reference")
    assert run.stdout.split() == ["reference", "cpp", "cpp"], run.stderr
    assert python(SELECTED, UNLEARN_KERNELS_BACKEND="").stdout.split() == ["cpp", "cpp", "cpp"]


def test_unknown_names_are_value_errors() -> None:
    for name in ("tpu", "", "CPP"):
        with pytest.raises(ValueError, match=f"backend must be one of {', '.join(BACKENDS)}, got {name!r}"):
            linear.sqnorms(A, G, backend=name)
        with pytest.raises(ValueError, match="name must be one of"), use_backend(name):
            pass
    run = python("import unlearn_kernels", UNLEARN_KERNELS_BACKEND="tpu")
    assert "ValueError: UNLEARN_KERNELS_BACKEND must be one of" in run.stderr


@NO_CUDA
def test_a_refusal_tells_four_facts() -> None:
    with pytest.raises(BackendError) as refusal:
        linear.sqnorms(A, G, backend="triton")
    message = str(refusal.value)
    assert message.startswith("linear_sqnorms: backend 'triton' was requested but ")
    assert "it needs a CUDA device" in message or "Triton is not installed" in message
    assert "Available here: cpp, reference." in message
    assert message.endswith("Pass backend='cpp' or name no backend.")


def test_a_request_never_falls_back() -> None:
    with pytest.raises(BackendError, match="'cuda' was requested but"), use_backend("cuda"):
        linear.sqnorms(A, G)
    meta = torch.empty(2, 3, 5, device="meta")
    with pytest.raises(BackendError, match="it runs on cpu, the tensors are on meta") as refusal:
        linear.sqnorms(meta, meta, backend="cpp")
    assert "Available here: none. Move the tensors or change their dtype." in str(refusal.value)


def test_a_dtype_that_no_kernel_takes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = REGISTRY[OPERATOR]
    narrow = replace(operator.impls["cpp"], dtypes=(torch.float64,))
    monkeypatch.setitem(REGISTRY, OPERATOR, replace(operator, impls={**operator.impls, "cpp": narrow}))
    with pytest.raises(BackendError, match=r"it does not take torch\.float32"):
        select(OPERATOR, "cpp", (A, G))


WITHOUT_EXTENSION = """
import sys, warnings
sys.modules["unlearn_kernels._C"] = None
import torch
from unlearn_kernels import BackendError
from unlearn_kernels.per_sample import linear
a, g = torch.ones(2, 3, 5), torch.ones(2, 3, 4)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    results = [linear.sqnorms(a, g) for _ in range(3)]
assert all(r.tolist() == [180.0, 180.0] for r in results), results
assert [w.category for w in caught] == [RuntimeWarning], caught
print(caught[0].message, "at", caught[0].filename)
try:
    linear.sqnorms(a, g, backend="cpp")
except BackendError as error:
    print(error)
"""


def test_without_the_extension_the_reference_runs_and_warns_once() -> None:
    run = python(WITHOUT_EXTENSION)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    warning, refusal = run.stdout.splitlines()
    assert warning.startswith(
        "linear_sqnorms runs on the slow reference path (cpp: the C++ extension is missing"
    )
    assert warning.endswith("at <string>")
    assert refusal.startswith("linear_sqnorms: backend 'cpp' was requested but the C++ extension is missing")
    assert "Available here: reference." in refusal


def test_public_names() -> None:
    assert unlearn_kernels.use_backend is use_backend
    assert issubclass(unlearn_kernels.BackendError, RuntimeError)

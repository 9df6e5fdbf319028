"""More than 2^31 elements: offsets are 64 bits wide, in memory that is written and read at its end."""

import pytest
import torch
from torch import Tensor

from unlearn_kernels import _loader, use_backend
from unlearn_kernels._backends import Backend
from unlearn_kernels.influence import Projection, topk
from unlearn_kernels.per_sample import embedding, linear
from unlearn_kernels.surgery import gramian, project_conflict_
from unlearn_kernels.token_loss import linear_nll

BEYOND = (1 << 31) + 4096
BYTES = 10 << 30

BACKENDS = pytest.mark.parametrize("backend", ["triton", "cuda"] if _loader.have_C_cuda else ["triton"])

pytestmark = pytest.mark.cuda_only


@pytest.fixture(autouse=True)
def room() -> None:
    """Skips where two such tensors in 16 bits would not fit."""
    free = torch.cuda.mem_get_info()[0]
    if free < 2 * BYTES:
        pytest.skip(f"needs {2 * BYTES >> 30} GB of memory, {free >> 30} are free")


def ends(rows: int, cols: int, device: str) -> tuple[Tensor, Tensor]:
    """Two matrices of the same numbers, one with its second half beyond element 2^31, one small."""
    near = torch.arange(2 * rows * cols, device=device).remainder(17).sub(8).half().view(2, rows, cols)
    memory = torch.empty(BEYOND + rows * cols, dtype=torch.half, device=device)
    far = memory.as_strided((2, rows, cols), (BEYOND, cols, 1))
    return far.copy_(near), near


def test_linear_sqnorms(device: str) -> None:
    far, near = ends(40, 24, device)
    assert torch.equal(linear.sqnorms(far, near), linear.sqnorms(near, near))
    assert torch.equal(
        linear.sqnorms(near, far, method="direct"), linear.sqnorms(near, near, method="direct")
    )


def test_embedding_sqnorms(device: str) -> None:
    far, near = ends(40, 24, device)
    ids = torch.arange(80, device=device).view(2, 40) % 11
    found, expected = (embedding.sqnorms(ids, g, num_embeddings=11) for g in (far, near))
    assert torch.equal(found, expected)


@BACKENDS
def test_gradient_lists(backend: Backend, device: str) -> None:
    forget = torch.ones(BEYOND, dtype=torch.bfloat16, device=device)
    retain = torch.full((BEYOND,), -1.0, dtype=torch.bfloat16, device=device)
    G = gramian([[forget], [retain]], backend=backend)
    assert G.tolist() == [[BEYOND, -BEYOND], [-BEYOND, BEYOND]]
    project_conflict_([forget], [retain], backend=backend)
    assert not forget[-5000:].any()
    assert not forget[:5000].any()


@BACKENDS
def test_projection_and_search(backend: Backend, device: str) -> None:
    far, near = (x[:, 0] for x in ends(3, 300, device))
    project = Projection(300, 32, seed=1)
    with use_backend(backend):
        assert torch.equal(project(far), project(near))
        for a, b in zip(topk(near, far, 2), topk(near, near, 2), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("nibbles", [False, True], ids=["int8", "int4"])
def test_scan_of_codes(nibbles: bool, device: str) -> None:
    """Rows of zeros beyond byte 2^31, but for a few at the end."""
    width = 1 << 12
    size = BEYOND // width + 7
    rows = torch.full((size, width), 0x88 if nibbles else 128, dtype=torch.uint8, device=device)
    rows[-3:] += 1
    columns = 2 * width if nibbles else width
    codes = torch.ones(2, columns, dtype=torch.int16, device=device)
    ones = torch.ones(size, columns // 128, device=device)
    values, indices = torch.ops.unlearn_kernels.scan_codes(
        codes, torch.ones(2, device=device), rows, ones, 128, 4, nibbles, 3
    )
    assert values[0].tolist() == [[width] * 3 + [0]] * 2
    assert indices[0].tolist() == [[size - 3, size - 2, size - 1, 0]] * 2
    assert not values[1].any()
    assert indices[1].tolist() == [[0, 1, 2, 3]] * 2


def test_token_loss(device: str) -> None:
    _, (near, _) = ends(40, 24, device)
    apart = BEYOND // 39 + 1
    far = (
        torch.empty(40 * apart, dtype=torch.half, device=device).as_strided((40, 24), (apart, 1)).copy_(near)
    )
    labels = torch.arange(40, device=device) % 7
    head = torch.arange(7 * 24, device=device).remainder(5).sub(2).half().view(7, 24)
    assert torch.equal(linear_nll(far, head, labels), linear_nll(near, head, labels))

"""Every rule by name, on as many gradients as it takes."""

from torch import Tensor

from unlearn_kernels import surgery
from unlearn_kernels.surgery import rules

PAIRS = ["agem", "gru", "blur", "ngdiff", "munba"]
MANY = [
    "pcgrad",
    "gradvac",
    "mgda",
    "cagrad",
    "imtl_g",
    "aligned_mtl",
    "nash_mtl",
    "upgrad",
    "dualproj",
    "config",
]
PLAIN = ["mean", "sum", "constant"]
SIZES = range(1, 9)


def options(name: str, sets: int) -> dict[str, object]:
    return {"values": [0.5 + k for k in range(sets)]} if name == "constant" else {}


def weigh(name: str, G: Tensor, **more: object) -> Tensor:
    return surgery.weights(G, name, **options(name, G.shape[-1]), **more)


def sizes(name: str) -> list[int]:
    return [2] if name in PAIRS else list(SIZES)


CASES = [(name, K) for name in rules.RULES for K in sizes(name)]

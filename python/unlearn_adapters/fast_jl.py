"""The functions of TRAK's CUDA extension `fast_jl`, on every device; `unlearn_adapters.trak.install` puts them there.

Each returns `input P^T` without a scale, as fast_jl does, (B, output_dims) float32: P of signs for `rademacher`, of
normal numbers for `normal`. Unlike there P depends on the seed alone and not on the GPU's multiprocessors (`num_sms`
is taken and ignored); inputs keep their digits and range where fast_jl rounds them to float16; bfloat16, any number of
outputs and any number of rows will do, whatever the number in a function's name.

Source: MadryLab/trak, fast_jl 0.1.3.
"""

from torch import Tensor

from unlearn_kernels.influence import Projection
from unlearn_kernels.influence.projection import Name


def _projected(kind: Name, g: Tensor, k: int, seed: int) -> Tensor:
    if g.dim() != 2:
        raise ValueError(f"input must be (B, D), got {tuple(g.shape)}")
    return (Projection(g.shape[1], k, kind, seed).project(g.detach()) * k**0.5).float()


def project_rademacher_8(input: Tensor, output_dims: int, seed: int, num_sms: int = 0) -> Tensor:
    """Signs."""
    return _projected("rademacher", input, output_dims, seed)


def project_normal_8(input: Tensor, output_dims: int, seed: int, num_sms: int = 0) -> Tensor:
    """Normal numbers."""
    return _projected("gaussian", input, output_dims, seed)


project_rademacher_16 = project_rademacher_32 = project_rademacher_8
project_normal_16 = project_normal_32 = project_normal_8

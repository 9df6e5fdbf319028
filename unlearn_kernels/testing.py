"""Inputs and comparisons shared by the tests and the benchmarks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str | None = None
) -> Tensor:
    """Standard normal numbers, rounded to `dtype`; the same on every device. None is torch's default device."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype)
    return numbers.to(torch.get_default_device() if device is None else device)


def relative_error(actual: Tensor, exact: Tensor | np.ndarray) -> float:
    """`|actual - exact| / |exact|` in the Frobenius norm; 0 where both are zero or empty.

    In float64, or in the precision of an array, which may be higher: `numpy.longdouble`.
    """
    found = actual.detach().double().cpu().numpy()
    right = exact.detach().double().cpu().numpy() if isinstance(exact, Tensor) else exact
    if found.shape != right.shape:
        raise AssertionError(f"shapes differ: {found.shape} and {right.shape}")
    with np.errstate(invalid="ignore"):  # inf - inf
        difference, scale = (float(np.linalg.norm(x.ravel())) for x in (found - right, right))
    return difference / scale if scale > 0 else difference


def assert_as_exact_as(
    name: str,
    actual: Tensor,
    exact: Tensor | np.ndarray,
    eager: Tensor,
    *,
    factor: float = 2.0,
    floor: float | None = None,
) -> None:
    """Asserts that `actual` is as near to `exact` (float64, same rounded inputs) as eager PyTorch is.

    Args:
        name: what the tensor is, for the message.
        actual: the kernel's result.
        exact: the reference's, in float64, or what is more exact than that.
        eager: the same formula in PyTorch in the dtype of the result.
        factor: how many times eager's error is accepted.
        floor: the error that is accepted whatever eager's; by default 4 units in the last place of `actual`.
    """
    floor = 4 * torch.finfo(actual.dtype).eps if floor is None else floor
    error, allowed = relative_error(actual, exact), max(factor * relative_error(eager, exact), floor)
    if not error <= allowed:
        raise AssertionError(f"{name}: relative error {error:.3e}, allowed {allowed:.3e}")


def at_threads(counts: tuple[int, ...], function: Callable[[], Any]) -> list[Any]:
    """`function()` at each number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
        return results
    finally:
        torch.set_num_threads(before)

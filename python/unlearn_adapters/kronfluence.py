"""Kronfluence's covariance and lambda matrices on the kernels: the same factors, for less.

.. code-block:: python

    from unlearn_adapters import kronfluence as kernels

    kernels.install()       # every Analyzer's trackers from now on
    analyzer.fit_all_factors("ekfac", dataset=train)

Covariances take half of a product's multiply-adds. The lambda matrix of a linear layer is made from inputs and output
gradients in the eigenbasis: no per-sample gradient (B, out, in), and the cheaper of the two orders of contraction.
Convolutions, shared parameters, gradients that a task processes, and dtypes other than the gradients' own take
Kronfluence's way. Factors are Kronfluence's to rounding, in its files and under its names.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from kronfluence.factor.config import FactorConfig
from kronfluence.module.linear import TrackedLinear
from kronfluence.module.tracker.factor import CovarianceTracker, LambdaTracker
from kronfluence.utils.constants import (
    ACTIVATION_COVARIANCE_MATRIX_NAME,
    ACTIVATION_EIGENVECTORS_NAME,
    GRADIENT_COVARIANCE_MATRIX_NAME,
    GRADIENT_EIGENVECTORS_NAME,
    LAMBDA_MATRIX_NAME,
    NUM_LAMBDA_PROCESSED,
)
from torch import Tensor, nn

from unlearn_kernels.influence import covariance, squared_gradients
from unlearn_kernels.influence.ekfac import rotated_squares

_activation: Final = CovarianceTracker._update_activation_covariance_matrix
_gradient: Final = CovarianceTracker._update_gradient_covariance_matrix
_hooks: Final = LambdaTracker.register_hooks


def _add_covariance(
    original: Callable[..., None], name: str, tracker: Any, x: Tensor, count: Tensor | int
) -> None:
    """Lets Kronfluence make its empty matrix and count, from no row, then adds."""
    original(tracker, x[:0], count)
    total = tracker.module.storage[name]
    scale = tracker.module.gradient_scale if name == GRADIENT_COVARIANCE_MATRIX_NAME else 1.0
    total.add_(covariance(x).to(total.dtype), alpha=scale**2)


def _update_activation(self: Any, input_activation: Tensor, count: Tensor | int) -> None:
    _add_covariance(_activation, ACTIVATION_COVARIANCE_MATRIX_NAME, self, input_activation, count)


def _update_gradient(self: Any, output_gradient: Tensor, count: Tensor | int) -> None:
    _add_covariance(_gradient, GRADIENT_COVARIANCE_MATRIX_NAME, self, output_gradient, count)


def _takes(module: Any) -> bool:
    args = module.factor_args
    return (
        isinstance(module, TrackedLinear)
        and not args.has_shared_parameters
        and module.per_sample_gradient_process_fnc is None
        and args.lambda_dtype == args.per_sample_gradient_dtype == torch.float32
    )


def _register_hooks(self: Any) -> None:
    if not _takes(self.module):
        _hooks(self)
        return

    @torch.no_grad()
    def forward(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Tensor) -> None:
        x = inputs[0].detach()
        device = "cpu" if self.module.factor_args.offload_activations_to_cpu else x.device
        self.cached_activations = x.to(device=device, dtype=torch.float32, copy=True)
        self.cached_hooks.append(outputs.register_hook(backward))

    @torch.no_grad()
    def backward(gradient: Tensor) -> None:
        if self.cached_activations is None:
            self._raise_cache_not_found_exception()
        self.cached_hooks.pop().remove()
        x = self.cached_activations.to(gradient.device)
        self.clear_all_cache()
        _add_lambda(self.module, x, gradient.detach().to(torch.float32))

    self.registered_hooks.append(self.module.register_forward_hook(forward))


def _add_lambda(module: Any, x: Tensor, gradient: Tensor) -> None:
    bias = module.original_module.bias is not None
    a, g = x.reshape(len(x), -1, x.shape[-1]), gradient.reshape(len(x), -1, gradient.shape[-1])
    storage = module.storage
    if FactorConfig.CONFIGS[module.factor_args.strategy].requires_eigendecomposition_for_lambda:
        names = GRADIENT_EIGENVECTORS_NAME, ACTIVATION_EIGENVECTORS_NAME
        if any(storage[name] is None for name in names):
            raise ValueError("eigendecompositions must be there before lambda matrices, fit them first")
        for name in names:
            storage[name] = storage[name].to(device=g.device, dtype=g.dtype)
        new = rotated_squares(a, g, (storage[names[0]], storage[names[1]]), bias=bias)
    else:
        new = squared_gradients(a, g, bias=bias)
    if module.gradient_scale != 1.0:
        new.mul_(module.gradient_scale**2)
    if storage[NUM_LAMBDA_PROCESSED] is None:
        storage[NUM_LAMBDA_PROCESSED] = torch.zeros(1, dtype=torch.int64)
        storage[LAMBDA_MATRIX_NAME] = torch.zeros_like(new)
    storage[NUM_LAMBDA_PROCESSED].add_(len(a))
    storage[LAMBDA_MATRIX_NAME].add_(new)


def install() -> None:
    """Puts these in the place of the trackers' methods."""
    CovarianceTracker._update_activation_covariance_matrix = _update_activation
    CovarianceTracker._update_gradient_covariance_matrix = _update_gradient
    LambdaTracker.register_hooks = _register_hooks


def uninstall() -> None:
    """Puts Kronfluence's back."""
    CovarianceTracker._update_activation_covariance_matrix = _activation
    CovarianceTracker._update_gradient_covariance_matrix = _gradient
    LambdaTracker.register_hooks = _hooks

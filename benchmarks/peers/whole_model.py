"""Per-sample norms and the clipped gradient of a whole model, as others get them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.models import Job
from benchmarks.peers import book_keeping


def flat_gradient(model: nn.Module) -> Tensor:
    """What the backward or its stand-in left in `.grad`."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def clipped(norms: Tensor, max_norm: float) -> Tensor:
    """Each sample's weight in the mean of clipped gradients."""
    return (max_norm / norms).clamp(max=1.0) / len(norms)


def loop_norms(job: Job, model: nn.Module) -> Tensor:
    """A forward and a backward a sample."""
    norms = []
    for sample in job.samples():
        model.zero_grad()
        job.losses(model, *sample).sum().backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms)


def loop_clip(job: Job, model: nn.Module) -> Tensor:
    """A forward and a backward a sample, each clipped and added."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for sample in job.samples():
        grads = torch.autograd.grad(job.losses(model, *sample).sum(), parameters)
        norm = torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
        scale = min(1.0, job.max_norm / float(norm)) / len(job.inputs[0])
        for sum_, g in zip(total, grads, strict=True):
            sum_.add_(g, alpha=scale)
    return torch.cat([x.flatten() for x in total])


def opacus_ghost(job: Job, clip: bool) -> Callable[[], Tensor]:
    """Ghost norms from a first backward; the clipped gradient from a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        job.model(), max_grad_norm=job.max_norm, loss_reduction="sum", strict=False
    )
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.nn")

    def run() -> Tensor:
        wrapped.enable_hooks()
        wrapped.zero_grad()
        losses = job.losses(wrapped, *job.inputs)
        losses.sum().backward(retain_graph=clip)
        norms = wrapped.get_norm_sample().detach()
        if not clip:
            return norms
        wrapped.zero_grad()
        wrapped.disable_hooks()
        (losses * clipped(norms, job.max_norm)).sum().backward()
        return flat_gradient(wrapped)

    return run


def opacus_hooks(job: Job, clip: bool) -> Callable[[], Tensor]:
    """Per-sample gradients formed in memory by hooks."""
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(job.model(), loss_reduction="sum", strict=False)
    parameters = list(wrapped.parameters())

    def run() -> Tensor:
        wrapped.zero_grad()
        job.losses(wrapped, *job.inputs).sum().backward()
        grads = [p.grad_sample.flatten(1) for p in parameters]
        for p in parameters:
            p.grad_sample = None
        return _clip(grads, job.max_norm, clip)

    return run


def book_keeping_hooks(job: Job, clip: bool) -> Callable[[], Tensor]:
    """fastDP's way: one backward without weight gradients, the clipped sum from what hooks kept."""
    model = job.model()
    return book_keeping.step(
        model, lambda: job.losses(model, *job.inputs), lambda norms: clipped(norms, job.max_norm), clip
    )


def vmap(job: Job, clip: bool) -> Callable[[], Tensor]:
    """`torch.func.vmap` of `grad`, a language model's positions left to the model."""
    from torch.func import functional_call, grad
    from torch.func import vmap as over_samples

    model = job.model()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    inputs = job.inputs[:1] if job.inputs[0].dtype == torch.long else job.inputs

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *sample: Tensor) -> Tensor:
            return job.losses(self.inner, *(x[None] for x in sample))[0]

    losses = Losses()

    def one(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return functional_call(losses, {f"inner.{name}": w for name, w in weights.items()}, sample)

    each = over_samples(grad(one), in_dims=(None, *(0 for _ in inputs)))

    def run() -> Tensor:
        grads = each(weights, *inputs)
        return _clip([g.flatten(1) for g in grads.values()], job.max_norm, clip)

    return run


def _clip(grads: list[Tensor], max_norm: float, clip: bool) -> Tensor:
    norms = torch.stack([g.norm(2, dim=1) for g in grads]).norm(2, dim=0)
    w = clipped(norms, max_norm)
    return torch.cat([w @ g for g in grads]) if clip else norms

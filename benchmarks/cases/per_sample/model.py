"""Norms of every sample's whole gradient, and a step of clipped gradients, of a model from one backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.models import Job, gpt2, llama, unet
from benchmarks.peers import whole_model
from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_OPERATORS = ("linear_sqnorms", "embedding_sqnorms", "norm_grads")
# Multiply-adds of a forward, by torch.utils.flop_counter.
_LANGUAGE = 11_274_289_152


def _ours(clip: bool) -> Callable[[Job], Call]:
    def build(job: Job) -> Call:
        from unlearn_kernels.per_sample import PerSampleGradients

        model = job.model()
        gradients = PerSampleGradients(model, keep="factors" if clip else "norms")

        def run() -> Tensor:
            model.zero_grad()
            with gradients:
                job.losses(model, *job.inputs).mean().backward()
                if not clip:
                    return gradients.norms()
                gradients.clip_(job.max_norm)
            return whole_model.flat_gradient(model)

        return Call(run)

    return build


def _plain(job: Job) -> Call:
    model = job.model()

    def run() -> None:
        model.zero_grad()
        job.losses(model, *job.inputs).mean().backward()

    return Call(run)


def _loop(clip: bool) -> Callable[[Job], Call]:
    def build(job: Job) -> Call:
        model = job.model()
        function = whole_model.loop_clip if clip else whole_model.loop_norms
        return Call(lambda: function(job, model))

    return build


def _reference(clip: bool) -> Callable[[Job], Tensor]:
    def reference(job: Job) -> Tensor:
        model = job.model(torch.float64)
        wide = Job(
            job.make, tuple(x.double() if x.is_floating_point() else x for x in job.inputs), job.losses
        )
        return (whole_model.loop_clip if clip else whole_model.loop_norms)(wide, model)

    return reference


def _providers(clip: bool) -> tuple[Provider, ...]:
    def peer(function: Callable[[Job, bool], Callable[[], Tensor]]) -> Callable[[Job], Call]:
        return lambda job: Call(function(job, clip))

    needs = ("transformers", "diffusers")
    return (
        Provider("unlearn_kernels", _ours(clip), "ours", requires=needs),
        Provider("plain forward+backward", _plain, "plain", requires=needs, yardstick=True),
        Provider("opacus ghost", peer(whole_model.opacus_ghost), requires=(*needs, "opacus")),
        Provider("opacus hooks", peer(whole_model.opacus_hooks), requires=(*needs, "opacus")),
        Provider("book-keeping hooks", peer(whole_model.book_keeping_hooks), requires=needs),
        Provider("torch vmap", peer(whole_model.vmap), requires=needs),
        Provider("batch-1 loop", _loop(clip), requires=needs),
    )


def _case(label: str, shape: str, make: Callable[[], Job], multiplied: int, parameters: int) -> None:
    """`multiplied`: multiply-adds of a forward, which a step repeats for `dx` and again for the sum."""
    for clip in (False, True):
        register(
            Case(
                f"per_sample.model.{'clip' if clip else 'norms'}/{label}/float32",
                ops=_OPERATORS,
                shape=shape,
                dtype=torch.float32,
                flops=(6 if clip else 4) * multiplied,
                bytes=4 * parameters * (2 if clip else 1),
                make=lambda device: make(),
                reference=_reference(clip),
                error=lambda _, output, reference: testing.relative_error(output, reference),
                providers=_providers(clip),
                bound=1e-5,
            )
        )


_case(
    "gpt2",
    "GPT-2, 4 layers, d 256, V 8192, B 16, T 128",
    lambda: gpt2(4, 256, 8192, 128, 16),
    _LANGUAGE,
    7_386_624,
)
_case(
    "llama",
    "Llama, 4 layers, d 256, V 8192, B 16, T 128",
    lambda: llama(4, 256, 8192, 128, 16),
    _LANGUAGE,
    7_342_336,
)
_case(
    "unet",
    "UNet of diffusers, 32, 64 and 128 channels, B 8, 32 x 32",
    lambda: unet((32, 64, 128), 32, 8),
    3_022_585_856,
    2_736_099,
)

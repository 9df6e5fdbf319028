"""Saliency masks over whole parameter lists, and gradients under them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import gradient_sets
from benchmarks.gradient_sets import Sets, Shapes, elements, gpt2, lora, sd15_kv
from benchmarks.peers import published_surgery
from benchmarks.registry import Call, Case, Provider, register

_FRACTION = 0.1


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def _ours(*, bits: bool) -> Callable[[Sets], Call]:
    def build(inputs: Sets) -> Call:
        from unlearn_kernels import surgery

        return Call(lambda: surgery.topk_mask(inputs.sets[0], _FRACTION, bits=bits))

    return build


def _boolean(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask.reshape(-1)
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.reshape(-1)[: like.numel()].bool()


def _mask_error(inputs: Sets, output: list[Tensor], least: Tensor) -> float:
    """The share of elements on the wrong side of the k-th magnitude, and how far the number is off, of k."""
    taken = total = wrong = 0
    for x, mask in zip(inputs.sets[0], output, strict=True):
        chosen, size = _boolean(mask, x), x.abs().reshape(-1)
        wrong += int((chosen & (size < least)).sum()) + int((~chosen & (size > least)).sum())
        taken, total = taken + int(chosen.sum()), total + x.numel()
    k = int(total * _FRACTION)
    return (wrong + abs(taken - k)) / k


def _kth(inputs: Sets) -> Tensor:
    size = _flat(inputs.sets[0]).abs()
    return size.kthvalue(size.numel() - int(size.numel() * _FRACTION) + 1).values


def _masks(project: Callable[[list[Tensor], float], list[Tensor]]) -> Callable[[Sets], Call]:
    return lambda inputs: Call(lambda: project(inputs.sets[0], _FRACTION))


_TOPK = (
    Provider("unlearn_kernels", _ours(bits=False), "ours"),
    Provider("unlearn_kernels, bits", _ours(bits=True), "peer"),
    Provider("torch.kthvalue of all, compare", _masks(published_surgery.threshold_masks), "plain"),
    Provider("SalUn's ranks", _masks(published_surgery.salun_masks)),
)


def _chosen(inputs: Sets) -> list[Tensor]:
    return [x > 0 for x in inputs.sets[0]]


def _ours_apply(inputs: Sets) -> Call:
    from unlearn_kernels import surgery

    masks, work = _chosen(inputs), inputs.work

    def run() -> list[Tensor]:
        surgery.apply_mask_(work, masks)
        return work

    return Call(run, inputs.restore)


def _products(inputs: Sets) -> Call:
    masks, work = _chosen(inputs), inputs.work

    def run() -> list[Tensor]:
        for x, mask in zip(work, masks, strict=True):
            x.mul_(mask)
        return work

    return Call(run, inputs.restore)


def _apply_error(inputs: Sets, output: list[Tensor], _: None) -> float:
    pairs = zip(output, inputs.sets[0], strict=True)
    return float(sum(not torch.equal(got, x.clamp(min=0)) for got, x in pairs))


_APPLY = (
    Provider("unlearn_kernels", _ours_apply, "ours"),
    Provider("torch mul_", _products, "plain"),
)


def _case(op: str, label: str, shapes: Shapes, dtype: torch.dtype, warm: Case | None) -> Case:
    n, topk = elements(shapes), op == "topk_mask"
    return register(
        Case(
            f"surgery.{op}/{label}/{str(dtype).removeprefix('torch.')}",
            ops=(op,),
            shape=f"{len(shapes)} tensors, {n / 1e6:.1f} M",
            dtype=dtype,
            flops=n,
            bytes=((1 if topk else 2) * dtype.itemsize + 1) * n,
            make=gradient_sets.make(shapes, 1, dtype),
            reference=_kth if topk else lambda inputs: None,
            error=_mask_error if topk else _apply_error,
            providers=_TOPK if topk else _APPLY,
            bound=1e-12,
            peer_bound=5e-2,
            bandwidth="read" if topk else "axpy",
            warm=warm,
        )
    )


for _dtype in (torch.float32, torch.bfloat16):
    for _op in ("topk_mask", "apply_mask"):
        _small = _case(_op, "small", gpt2(2048, 128, 2, 128), _dtype, None)
        _case(_op, "sd15-kv", sd15_kv(), _dtype, _small)
        _case(_op, "lora-llama2-7b", lora(), _dtype, _small)
        _case(_op, "gpt2-124m", gpt2(), _dtype, _small)

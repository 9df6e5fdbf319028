"""Rows as a store keeps them, beside the same by operations of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.registry import Call, Case, Provider, register
from unlearn_kernels import testing

_BLOCK = 128
_BITS = {"bfloat16": 16, "int8": 8, "int4": 4}

Rows = tuple[Tensor, Tensor, Tensor]


def _ours(bits: int, unbiased: bool) -> Provider:
    def run(x: Tensor) -> Rows:
        from unlearn_kernels._backends import select

        found: Rows = select("encode_rows", None, (x,))(x, bits, _BLOCK, unbiased, 0, 0)
        return found

    return Provider("unlearn_kernels", lambda x: Call(lambda: run(x)), "ours")


def _plain(x: Tensor, bits: int, unbiased: bool) -> Rows:
    sqnorms = x.double().square().sum(1)
    if bits == 16:
        return x.bfloat16(), x[:, :0], sqnorms
    levels = 127 if bits == 8 else 7
    blocks = x.unflatten(1, (-1, _BLOCK))
    scales = blocks.abs().amax(2) / levels
    shift = torch.rand_like(blocks) if unbiased else 0.5
    codes = (blocks / scales[..., None] + shift + (levels + 1)).to(torch.uint8).flatten(1)
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4, scales, sqnorms


def _error(x: Tensor, output: Rows, _: Rows) -> float:
    """How far what is kept is from the rows, relative to their largest magnitude."""
    codes, scales, _norms = output
    if codes.is_floating_point():
        return float((codes.float() - x).abs().max() / x.abs().max())
    nibbles = codes.shape[1] < x.shape[1]
    wide = torch.stack((codes & 15, codes >> 4), 2).flatten(1) if nibbles else codes
    values = (wide.float() - (8 if nibbles else 128)).unflatten(1, (-1, _BLOCK)) * scales[..., None]
    return float((values.flatten(1) - x).abs().max() / x.abs().max())


def _case(n: int, D: int, kind: str, unbiased: bool, label: str, warm: Case | None) -> Case:
    bits = _BITS[kind]
    return register(
        Case(
            f"influence.encode_rows/{label}/{kind}{'-unbiased' if unbiased else ''}",
            ops=("encode_rows",),
            shape=f"{n} x {D}",
            dtype=torch.float32,
            flops=8 * n * D,
            bytes=n * D * 4 + n * D * bits // 8,
            make=lambda device: testing.randn(n, D, device=device),
            reference=lambda x: _plain(x, bits, False),
            error=_error,
            providers=(
                _ours(bits, unbiased),
                Provider("torch", lambda x: Call(lambda: _plain(x, bits, unbiased)), "plain"),
            ),
            bound={16: 2**-8, 8: 1.01 / 127, 4: 1.01 / 7}[bits],
            threads=1,
            warm=warm,
        )
    )


for _kind in _BITS:
    for _unbiased in (False, True) if _kind != "bfloat16" else (False,):
        _small = _case(64, 256, _kind, _unbiased, "small", None)
        _case(65_536, 1024, _kind, _unbiased, "65k", _small)

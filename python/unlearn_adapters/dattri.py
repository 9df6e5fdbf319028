"""dattri's random projections and inverse-Hessian products on the kernels, with its signatures.

.. code-block:: python

    from unlearn_adapters import dattri as kernels

    kernels.install()      # dattri's attributors call these from now on

Differences on purpose: numbers of a projection depend on its seed alone, on every device, no part of its matrix is in
memory, and `sjlt` and `grass` run on CPUs; CG and LiSSA stop each vector at its own residual (dattri takes `tol` and
never reads it) and share one Hessian product for all vectors; LiSSA raises where it diverges; `ihvp_at_x_lissa` does
not exchange `batch_size` with `num_repeat`.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

import torch
from dattri.func import hessian as theirs
from dattri.func import projection as their_projection
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from unlearn_kernels.influence import Projection, arnoldi, cg, lissa
from unlearn_kernels.influence.projection import Name

Features: TypeAlias = Tensor | Mapping[str, Tensor]
Inverse: TypeAlias = Callable[[Tensor], Tensor]
_KINDS: Final[dict[str, Name]] = {"normal": "gaussian", "rademacher": "rademacher", "sjlt": "sjlt"}
_ENSEMBLES: Final = 1 << 31
_before: dict[tuple[str, str], Any] = {}


def _flat(feature: Features) -> list[Tensor]:
    parts = [feature] if isinstance(feature, Tensor) else list(feature.values())
    return [x.detach().flatten(1) if x.dim() > 1 else x.detach()[:, None] for x in parts]


def random_project(
    feature: Features,
    feature_batch_size: int,
    proj_dim: int,
    proj_max_batch_size: int = 32,
    proj_seed: int = 0,
    proj_type: str = "normal",
    *,
    device: str | torch.device = "cpu",
) -> Callable[..., Tensor]:
    """Return a function `(feature, ensemble_id=0)` to (B, proj_dim), as `dattri.func.projection.random_project`.

    Args:
        feature: features as they will come, (B, D) or (B, *shape) by name: their sizes are taken.
        feature_batch_size: B of `feature`.
        proj_dim: outputs.
        proj_max_batch_size: ignored.
        proj_seed: less than 2^31.
        proj_type: `normal`, `rademacher`, `sjlt`, `identity`, `random_mask` (some coordinates, without a scale),
            `grass` or `grass_N` (`sjlt` of N proj_dim such coordinates), on any device.
        device: where the results are.

    Raises:
        ValueError: for another type or a seed out of range.
    """
    kind, multiple = _type(proj_type)
    if not 0 <= proj_seed < _ENSEMBLES:
        raise ValueError(f"proj_seed must be between 0 and {_ENSEMBLES - 1}, got {proj_seed}")
    dim = sum(x.numel() for x in _flat(feature)) // feature_batch_size

    def project(feature: Features, ensemble_id: int = 0) -> Tensor:
        parts, seed = _flat(feature), proj_seed + _ENSEMBLES * ensemble_id
        if sum(x.shape[1] for x in parts) != dim:
            raise ValueError(f"feature must have {dim} numbers a row, got {sum(x.shape[1] for x in parts)}")
        dtype = parts[0].dtype
        if kind == "identity":
            return torch.cat(parts, dim=1).to(device)
        if kind in ("random_mask", "grass"):
            count = min(dim, proj_dim * multiple if kind == "grass" else proj_dim)
            parts = [torch.cat(parts, dim=1)[:, _mask(dim, count, seed).to(parts[0].device)]]
            if kind == "random_mask":
                return parts[0].to(device)
        running = Projection(
            sum(x.shape[1] for x in parts), proj_dim, _KINDS.get(kind, "sjlt"), seed
        ).running()
        for x in parts:
            running.add(x)
        return running.result().to(device, dtype)

    return project


def _type(proj_type: str) -> tuple[str, int]:
    whole = str(getattr(proj_type, "value", proj_type))
    kind, _, multiple = whole.partition("_")
    if kind == "grass" and (multiple or "4").isdecimal() and int(multiple or 4) > 0:
        return kind, int(multiple or 4)
    if whole not in (*_KINDS, "identity", "random_mask"):
        raise ValueError(
            "proj_type must be one of normal, rademacher, sjlt, identity, random_mask, grass, grass_N, "
            f"got {proj_type!r}"
        )
    return whole, 1


def _mask(dim: int, count: int, seed: int) -> Tensor:
    """Different coordinates: the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(dim, generator=generator)[:count].sort().values


def _rows(v: Tensor) -> Tensor:
    return v[None] if v.dim() == 1 else v


def _products(func: Callable[..., Tensor], x: tuple[Any, ...], argnums: int, mode: str) -> Inverse:
    """Products of (Q, D) with the Hessian, in any dtype: dattri's forward mode knows float32 alone."""
    gradient = grad(func, argnums=argnums)

    def along(w: Tensor) -> Tensor:
        return gradient(*x[:argnums], w, *x[argnums + 1 :])

    if mode == "rev-rev":
        back = vjp(along, x[argnums])[1]
        return vmap(lambda v: back(v)[0])
    if mode == "rev-fwd":
        return vmap(lambda v: jvp(along, (x[argnums],), (v,))[1])
    raise theirs.IHVPUsageError(f"mode must be 'rev-rev' or 'rev-fwd', got {mode!r}")


def ihvp_at_x_cg(
    func: Callable[..., Tensor],
    *x: Any,
    argnums: int = 0,
    max_iter: int = 10,
    tol: float = 1e-7,
    mode: str = "rev-rev",
    regularization: float = 0.0,
) -> Inverse:
    """Return v (D,) or (Q, D) to `(H + regularization)^{-1} v`, (Q, D), by `cg`, as dattri's of the same name.

    `tol` is relative to each vector's norm; the first guess is zero, where dattri's is v.
    """
    product = _products(func, x, argnums, mode)

    def solve(v: Tensor) -> Tensor:
        return cg(product, _rows(v), damping=regularization, tol=tol, max_iter=max_iter).x

    return solve


def ihvp_cg(
    func: Callable[..., Tensor], argnums: int = 0, *args: Any, **options: Any
) -> Callable[..., Tensor]:
    """Return `(x, v)` to what `ihvp_at_x_cg(func, *x)(v)` is; further arguments as there."""
    named = dict(zip(("max_iter", "tol", "mode", "regularization"), args, strict=False)) | options
    return lambda x, v: ihvp_at_x_cg(func, *x, argnums=argnums, **named)(v)


def ihvp_at_x_arnoldi(
    func: Callable[..., Tensor],
    *x: Any,
    argnums: int = 0,
    max_iter: int = 100,
    top_k: int = 100,
    norm_constant: float = 1.0,
    tol: float = 1e-7,
    mode: str = "rev-fwd",
    regularization: float = 0.0,
) -> Inverse:
    """Return v to its part among the `top_k` eigenvectors over their eigenvalues, by `arnoldi`, as dattri's.

    The first vector is drawn by a seed of its own, not by torch's; `norm_constant` and `tol` change nothing here: the
    basis is orthogonalised twice and ends where the space does.
    """
    product = _products(func, x, argnums, mode)

    def solve(v: Tensor) -> Tensor:
        rows = _rows(v)
        start = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        steps = max(1, min(max_iter - 1, rows.shape[1]))
        pairs = arnoldi(product, start.to(rows), steps=steps, top=min(top_k, steps))
        return pairs.solve(rows, damping=regularization).x

    return solve


def ihvp_arnoldi(
    func: Callable[..., Tensor], argnums: int = 0, *args: Any, **options: Any
) -> Callable[..., Tensor]:
    """Return `(x, v)` to what `ihvp_at_x_arnoldi(func, *x)(v)` is; further arguments as dattri's."""
    named = dict(zip(("max_iter", "tol", "mode", "regularization"), args, strict=False)) | options
    return lambda x, v: ihvp_at_x_arnoldi(func, *x, argnums=argnums, **named)(v)


def ihvp_lissa(
    func: Callable[..., Tensor],
    argnums: int = 0,
    batch_size: int = 1,
    num_repeat: int = 1,
    recursion_depth: int = 5000,
    damping: float = 0.0,
    scaling: float = 50.0,
    collate_fn: Callable[[Any], Any] | None = None,
    mode: str = "rev-rev",
) -> Callable[..., Tensor]:
    """Return `(x, v, in_dims=None)` to LiSSA's estimate of `(H + damping scaling)^{-1} v`, as dattri's.

    All vectors meet the same batch in a step; a vector whose step has become smaller than 1e-7 of it stands still.

    Raises:
        ArithmeticError: from the function, if it diverges: `scaling` is too small.
    """

    def solve(x: tuple[Any, ...], v: Tensor, in_dims: tuple[Any, ...] | None = None) -> Tensor:
        count = theirs._check_input_size(*x, in_dims=in_dims)

        def random_product(rows: Tensor) -> Tensor:
            batch = theirs._sample_random_batch(*x, batch_size=batch_size, num_samples=count, in_dims=in_dims)
            given = batch if collate_fn is None else collate_fn(batch)
            return _products(func, given, argnums, mode)(rows)

        estimates = [
            lissa(
                random_product,
                _rows(v),
                damping=damping * scaling,
                scale=scaling,
                tol=1e-7,
                max_iter=recursion_depth,
            ).x
            for _ in range(num_repeat)
        ]
        return torch.stack(estimates).mean(0)

    return solve


def ihvp_at_x_lissa(
    func: Callable[..., Tensor], *x: Any, in_dims: tuple[Any, ...] | None = None, **options: Any
) -> Inverse:
    """Return v to what `ihvp_lissa(func, ...)(x, v, in_dims)` is; options as there."""
    solve = ihvp_lissa(func, **options)
    return lambda v: solve(x, v, in_dims=in_dims)


_OURS: Final[dict[str, Any]] = {
    "random_project": random_project,
    "ihvp_at_x_arnoldi": ihvp_at_x_arnoldi,
    "ihvp_arnoldi": ihvp_arnoldi,
    "ihvp_at_x_cg": ihvp_at_x_cg,
    "ihvp_at_x_lissa": ihvp_at_x_lissa,
    "ihvp_cg": ihvp_cg,
    "ihvp_lissa": ihvp_lissa,
}

_THEIRS: Final = {n: getattr(their_projection if n == "random_project" else theirs, n) for n in _OURS}


def install() -> None:
    """Puts these in the place of dattri's, in its modules that are loaded and those that will be."""
    for path, module in list(sys.modules.items()):
        if path.split(".")[0] != "dattri":
            continue
        for attribute, value in list(vars(module).items()):
            name = next((n for n, original in _THEIRS.items() if value is original), None)
            if name is not None:
                _before[path, attribute] = value
                setattr(module, attribute, _OURS[name])


def uninstall() -> None:
    """Puts dattri's back."""
    while _before:
        (path, attribute), value = _before.popitem()
        setattr(sys.modules[path], attribute, value)

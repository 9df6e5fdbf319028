"""Per-sample gradients of a whole model from one forward and one backward."""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlearn_kernels.per_sample._batch import Batch, By, Projections
from unlearn_kernels.per_sample._layout import Layout
from unlearn_kernels.per_sample._parallel import parallel_of
from unlearn_kernels.per_sample._recorder import Keep, Recorder
from unlearn_kernels.per_sample._survey import Fallback, survey, unwrapped


class PerSampleGradients:
    r"""Norms, inner products, weighted sums and projections of the gradients of every sample's loss.

    .. code-block:: python

        per_sample = PerSampleGradients(model)
        with per_sample:
            loss = model(inputs).loss          # a mean over the samples
            loss.backward()                    # no parameter's gradient is computed
            norms = per_sample.clip_(1.0)      # .grad = 1/B \sum_i min(1, 1 / |g_i|) g_i
        optimizer.step()

    Inside the block, the inputs of each layer and the gradients at its outputs are kept, and the parameters'
    own gradients are never computed: their `requires_grad` is off until the block is left. What a forward and
    its backwards leave is one batch; the next forward of the model drops it.

    Args:
        model: any model whose trainable parameters are in linear, embedding, convolution and normalisation
            modules, torch's or transformers'; also in `DistributedDataParallel`, sharded by `fully_shard`
            (FSDP2), or compiled (it then runs eagerly inside the block). Frozen parameters are left out.
        loss_reduction: whether the loss is the "mean" or the "sum" of the samples' losses; with "mean" a
            backward's gradients are B times too small, and are scaled. With several processes, each takes the
            mean of its own samples.
        keep: "factors" for all verbs; "norms" computes each layer's norms during the backward and drops its
            factors at once (those of shared parameters stay until the norms are asked for).
        batch_size: samples in a batch; by default the first dimension of the model's first tensor argument.
        batch_first: whether samples are the first dimension of every module's tensors, or the second.
        layout: for modules, by path, whose tensors are otherwise: "broadcast" for one that all samples share,
            "folded" for a flattened (B * T, ...), "samples" where an embedding's ids look like positions.
            Ids (1, T), and vectors of ids that are not B long, are recognised as shared.
        fallback: "vmap" runs modules without a kernel again, sample by sample, and keeps their parameters'
            gradients (B, *shape): exact, slow, and open to modules that `torch.func` can run. None refuses them.
        backward_grads: leaves the parameters' own gradients to the backward, as if this were not here.
        tensor_parallel: the processes that share each layer; norms and inner products take one all-reduce.

    Raises:
        ValueError: if nothing is trainable; if modules with trainable parameters have no kernel (each is named
            with its class and what to do); from a forward whose shapes do not hold the samples where expected,
            or that uses a parameter outside of the module that has it.

    Memory: inputs and output gradients of all layers until the verbs are through with them (`keep="norms"`: of
    one layer); (B, p) for each bias, scale and normalisation. Gradients (B, *shape) are formed by `grads` alone.

    Sources: Goodfellow 2015 (arXiv 1510.01799); Li et al. 2022 (arXiv 2110.05679); Bu et al. 2023
    (arXiv 2210.00038, book-keeping). Shared weights, cross terms included: `docs/per_sample.md`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_reduction: Literal["mean", "sum"] = "mean",
        keep: Keep = "factors",
        batch_size: int | None = None,
        batch_first: bool = True,
        layout: Mapping[str, Layout] | None = None,
        fallback: Fallback = None,
        backward_grads: bool = False,
        tensor_parallel: dist.ProcessGroup | None = None,
    ) -> None:
        _one_of("loss_reduction", loss_reduction, ("mean", "sum"))
        _one_of("keep", keep, ("factors", "norms"))
        _one_of("fallback", fallback, (None, "vmap"))
        self.model, self.inner = model, unwrapped(model)
        _check_wrappers(model)
        self.parameters = {name: p for name, p in self.inner.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ValueError("model has no trainable parameters")
        self.parallel = parallel_of(model, self.parameters, tensor_parallel)
        followed, problems = survey(self.inner, self.parameters, fallback, self.parallel.parts)
        if problems:
            raise ValueError(_refusal(problems))
        self.layers = {one.layer.path: one.layer.kind for one in followed}
        self.backward_grads = backward_grads
        self._recorder = Recorder(
            self.inner,
            followed,
            lambda: Batch(self.parameters, self.parallel, loss_reduction == "mean"),
            keep=keep,
            batch_size=batch_size,
            batch_first=batch_first,
            layout=_layouts(layout or {}, self.layers),
        )
        self._leave: ExitStack | None = None

    def __enter__(self) -> "PerSampleGradients":
        if self._leave is not None:
            raise RuntimeError("PerSampleGradients is already entered")
        self._check_unchanged()
        with ExitStack() as stack:
            if not self.backward_grads:
                stack.enter_context(self.parallel.quiet())
                stack.callback(self._require_grad, True)
                self._require_grad(False)
            if _compiled(self.model):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.callback(self._recorder.detach)
            self._recorder.attach()
            self._leave = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        leave, self._leave = self._leave, None
        if leave is not None:
            leave.close()

    def _check_unchanged(self) -> None:
        for path, module in self.inner.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"{path} ({type(module).__name__}) mixes the samples while it is in training mode"
                )
        trainable = {name for name, p in self.inner.named_parameters() if p.requires_grad}
        changed = sorted(trainable ^ set(self.parameters))
        if changed:
            raise ValueError(
                f"{changed[0]} was frozen or set free after PerSampleGradients was made: make another"
            )

    def _require_grad(self, wanted: bool) -> None:
        for parameter in self.parameters.values():
            parameter.requires_grad_(wanted)

    @property
    def batch(self) -> Batch:
        """The last batch."""
        return self._recorder.batch

    def take(self) -> Batch:
        """The last batch, for `dots` with later ones; the next begins empty."""
        return self._recorder.take()

    def unused(self) -> list[str]:
        """Names of followed parameters that the last batch's backward did not reach; their gradients are zero."""
        return self.batch.unused()

    def sqnorms(self, by: By = "sample") -> Tensor | dict[str, Tensor]:
        """Squared norms of the samples' gradients.

        Args:
            by: "sample" for the whole gradient, "parameter" for each parameter's.

        Returns:
            (B,), or a dict of them by the parameter's name; float32, or float64 if a parameter is.
        """
        return self.batch.sqnorms(by)

    def norms(self, by: By = "sample") -> Tensor | dict[str, Tensor]:
        """Square roots of `sqnorms`."""
        found = self.sqnorms(by)
        return found.sqrt() if isinstance(found, Tensor) else {name: x.sqrt() for name, x in found.items()}

    def weighted_sum_(self, w: Tensor, *, release: bool = True) -> None:
        r"""Adds `\sum_i w_i g_i` to every parameter's `.grad`, with no second backward.

        Over micro-batches it accumulates, as a backward does. With several processes the sum is over the samples
        of all of them, whatever the loss's reduction.

        Args:
            w: one weight a sample, (B,).
            release: drops each layer's factors once they are used; False keeps them for further verbs.

        Raises:
            ValueError: if `w` has another shape.
            RuntimeError: if there is no batch, its factors were released, or only norms were kept.
        """
        self.batch.weighted_sum_(w, release=release)

    def clip_(self, max_norm: float, *, release: bool = True) -> Tensor:
        r"""Adds the clipped gradient, `\sum_i \min(1, C / |g_i|) g_i`, to `.grad`; for a mean loss, over B.

        B is the number of samples of all processes.

        Args:
            max_norm: C, the largest norm of a sample's gradient.
            release: see `weighted_sum_`.

        Returns:
            The norms before clipping, (B,).
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}")
        norms = self.norms()
        assert isinstance(norms, Tensor)
        w = (max_norm / norms).clamp(max=1.0)
        if self.batch.mean:
            w = w / self.parallel.total(self.batch.samples)
        self.weighted_sum_(w, release=release)
        return norms

    def dots(self, other: "Batch | PerSampleGradients", *, summed: bool = False) -> Tensor:
        """Inner products with the gradients of another batch of the same model.

        Args:
            other: a batch that `take` returned, or another `PerSampleGradients`.
            summed: against the sum of the other batch's gradients.

        Returns:
            (B1, B2), or (B1,) if `summed`.
        """
        return self.batch.dots(other.batch if isinstance(other, PerSampleGradients) else other, summed)

    def project(self, projection: Projections) -> Tensor | dict[str, Tensor]:
        """The samples' gradients, projected.

        Args:
            projection: an `influence.Projection` of all followed parameters, flattened one after another in the
                model's order; or one for each parameter, by name: a `Projection` of its size, or `TwoSided`.

        Returns:
            (B, k), or a dict of them by name; float32 (float64 if a parameter is). The first form takes the
            parameters one after another, 16 MB of gradients at a time: of a linear layer some rows of all samples,
            of a convolution some samples.
        """
        return self.batch.project(projection)

    def grads(self) -> dict[str, Tensor]:
        """The gradients themselves, (B, *shape), by the parameter's name."""
        return self.batch.grads()


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _check_wrappers(model: nn.Module) -> None:
    for module in model.modules():
        if type(module).__name__ in ("DataParallel", "FullyShardedDataParallel"):
            raise ValueError(
                f"model is in {type(module).__name__}, which hides its parameters: "
                "use DistributedDataParallel or fully_shard"
            )


def _layouts(layout: Mapping[str, Layout], layers: Mapping[str, str]) -> Mapping[str, Layout]:
    for path, kind in layout.items():
        if path not in layers:
            raise ValueError(f"layout names {path!r}, which is no module with followed parameters")
        _one_of(f"layout[{path!r}]", kind, ("samples", "broadcast", "folded"))
    return layout


def _refusal(problems: list[str]) -> str:
    listed = "\n  ".join(problems)
    return (
        f"modules with trainable parameters that cannot be followed:\n  {listed}\n"
        "Freeze these parameters (requires_grad_(False)), or pass fallback='vmap'."
    )


def _compiled(model: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())

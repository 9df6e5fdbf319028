"""The hooks: where a batch begins, what each layer keeps of a call, and where its gradients go."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from unlearn_kernels.per_sample._batch import UNKNOWN, Batch
from unlearn_kernels.per_sample._layout import Layout, Placement, place
from unlearn_kernels.per_sample._parallel import is_dtensor
from unlearn_kernels.per_sample._survey import Followed
from unlearn_kernels.per_sample._tap import Tap
from unlearn_kernels.per_sample._watch import Watch
from unlearn_kernels.per_sample.modules.fallback import FallbackLayer, float_tensors
from unlearn_kernels.per_sample.modules.layer import Kept
from unlearn_kernels.per_sample.modules.use import NormsOnly

Keep: TypeAlias = Literal["factors", "norms"]


def in_backward() -> bool:
    """Whether autograd is at work: a forward then is a checkpointed block run again."""
    return bool(torch._C._current_graph_task_id() != -1)


class Recorder:
    """Hooks on a model's layers that fill one batch after another.

    Args:
        model: the model, without wrappers.
        followed: its layers.
        fresh: makes an empty batch.
        keep: whether factors are kept, or norms alone.
        batch_size: samples, or None to take them from the model's first tensor argument.
        batch_first: whether samples are the first dimension of every tensor, or the second.
        layout: how the named modules are laid out, where it differs.
    """

    def __init__(
        self,
        model: nn.Module,
        followed: Sequence[Followed],
        fresh: Callable[[], Batch],
        *,
        keep: Keep,
        batch_size: int | None,
        batch_first: bool,
        layout: Mapping[str, Layout],
    ) -> None:
        self.model, self.followed, self.fresh = model, followed, fresh
        self.keep, self.batch_size, self.batch_first, self.layout = keep, batch_size, batch_first, layout
        self.batch = fresh()
        self.shared = Counter(name for one in followed for name in one.names.values())
        self.anchor = torch.empty(0, requires_grad=True)
        self.active = self.computing = False
        self._handles: list[RemovableHandle] = []
        self._watch: Watch | None = None
        self._watched = False

    def attach(self) -> None:
        """Puts the hooks on."""
        self.active = True
        add = self._handles.append
        add(self.model.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True))
        for one in self.followed:
            module = one.layer.module
            add(module.register_forward_pre_hook(self._entering(one)))
            add(module.register_forward_hook(self._called(one), with_kwargs=True))
            add(module.register_forward_hook(self._left, always_call=True))
        add(self.model.register_forward_hook(self._unwatch, always_call=True))

    def detach(self) -> None:
        """Takes the hooks off and forgets the batch."""
        self.active = False
        self._unwatch()
        while self._handles:
            self._handles.pop().remove()
        self.batch = self.fresh()

    def take(self) -> Batch:
        """The batch, and an empty one in its place."""
        taken, self.batch = self.batch, self.fresh()
        return taken

    def _begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if in_backward() or self.computing or not torch.is_grad_enabled():
            return
        if self.batch.answered:
            self.batch = self.fresh()
        samples = self.batch_size
        if samples is None:
            samples = _samples(args, kwargs, self.batch_first)
        if self.batch.samples not in (UNKNOWN, samples):
            raise ValueError(f"two forwards of one batch have {self.batch.samples} and {samples} samples")
        self.batch.samples = samples
        if not self._watched and not any(is_dtensor(p) for p in module.parameters()):
            self._watch = self._new_watch()
            self._watch.__enter__()

    def _new_watch(self) -> Watch:
        names, owners = {}, {}
        for one in self.followed:
            own = {id(one.layer.module.get_parameter(a)): name for a, name in one.names.items()}
            names.update(own)
            owners[one.layer.path] = list(own)
        return Watch(names, owners)

    def _unwatch(self, *_: Any) -> None:
        if self._watch is not None:
            self._watch.__exit__(None, None, None)
            self._watch, self._watched = None, True

    def _entering(self, one: Followed) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self._watch is not None:
                self._watch.running.append(one.layer.path)

        return hook

    def _left(self, *_: Any) -> None:
        if self._watch is not None:
            self._watch.running.pop()

    def _called(self, one: Followed) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.computing:
                return None
            if not in_backward():
                self._count(one.layer.path)
            return self._tapped(one, args, kwargs, output) if torch.is_grad_enabled() else None

        return hook

    def _count(self, path: str) -> None:
        if self.batch.answered and torch.is_grad_enabled():
            self.batch = self.fresh()
        if self.batch.samples == UNKNOWN and self.batch_size is not None:
            self.batch.samples = self.batch_size
        self.batch.calls[path] += 1

    def _tapped(self, one: Followed, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        layer, batch = one.layer, self.batch
        if batch.samples == UNKNOWN:
            raise ValueError(f"{layer.path} ran outside of the model's own forward: pass batch_size=")
        outputs = float_tensors(output)
        if not isinstance(layer, FallbackLayer) and len(outputs) != 1:
            raise ValueError(f"{layer.path}: one tensor expected as the output, got {type(output).__name__}")
        kept = layer.keep(args, kwargs, outputs)
        outputs, tensors, placement = place(
            layer,
            outputs,
            tuple(local(x) for x in kept.tensors),
            batch.samples,
            self.layout.get(layer.path),
            self.batch_first,
        )
        receive = self._receiver(one, batch, kept.note, placement)
        tapped = Tap.apply(receive, self.anchor, len(outputs), *outputs, *(x.detach() for x in tensors))
        return _replaced(output, tapped)

    def _receiver(
        self, one: Followed, batch: Batch, note: Any, placement: Placement
    ) -> Callable[[tuple[Tensor, ...], tuple[Tensor | None, ...]], None]:
        def receive(tensors: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> None:
            if not self.active:
                raise RuntimeError("the backward of a forward inside PerSampleGradients ran outside of it")
            batch.answered = True
            kept = Kept(tuple(placement(x) for x in tensors), note)
            self._take(one, batch, kept, tuple(None if g is None else placement(local(g)) for g in grads))

        return receive

    @torch.no_grad()
    def _take(self, one: Followed, batch: Batch, kept: Kept, grads: tuple[Tensor | None, ...]) -> None:
        self.computing = True
        try:
            for attribute, use in one.layer.uses(kept, grads).items():
                name = one.names[attribute]
                if self.keep == "norms":
                    alone = self.shared[name] == 1 and batch.calls[one.layer.path] == 1
                    if alone and batch.has(name):
                        raise RuntimeError(f"a second backward reached {name}, whose factors were not kept")
                    use = NormsOnly(use.sqnorms()) if alone else use
                batch.add(name, use)
        finally:
            self.computing = False


def local(x: Tensor) -> Tensor:
    """The part of a `DTensor` that lies in the process."""
    return x.to_local() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _samples(args: Any, kwargs: Any, batch_first: bool) -> int:
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, Tensor) and leaf.dim() > (0 if batch_first else 1):
            return leaf.shape[0 if batch_first else 1]
    raise ValueError("the model's arguments have no tensor with a batch dimension: pass batch_size=")


def _replaced(output: Any, tapped: tuple[Tensor, ...]) -> Any:
    leaves, frame = pytree.tree_flatten(output)
    given = iter(tapped)
    return pytree.tree_unflatten(
        [next(given) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves], frame
    )

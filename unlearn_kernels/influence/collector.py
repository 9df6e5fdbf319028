"""From a data set to a store of its samples' gradients: one forward and one backward a batch; a killed run goes on."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unlearn_kernels.influence._codes import Format
from unlearn_kernels.influence._shards import MANIFEST
from unlearn_kernels.influence.projection import Projection
from unlearn_kernels.influence.store import GradientStore, Progress

if TYPE_CHECKING:
    from unlearn_kernels.per_sample import PerSampleGradients, TwoSided

Losses: TypeAlias = Callable[[nn.Module, Any], Tensor]
Projected: TypeAlias = "Projection | Mapping[str, Projection | TwoSided] | None"


class Dataset(Protocol):
    """Samples by number, as of `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


class InfluenceCollector:
    r"""Puts the projected gradient of every sample's loss into a `GradientStore`.

    .. code-block:: python

        projection = Projection(sum(p.numel() for p in model.parameters()), k=1024)
        with InfluenceCollector.store("rows", model, projection) as store:
            collector = InfluenceCollector(model, projection, store, loss=language_losses)
            collector.collect(dataset, batch_size=16, progress=print)
            found = store.topk(collector.rows(queries), k=10)

    Nothing of size B x P is made: gradients are projected from the inputs and output gradients of their layers, a layer
    after the other, by `PerSampleGradients.project`. The model's `.grad` is left alone, its mode is the caller's:
    `model.eval()` takes dropout out of the gradients.

    Args:
        model: see `PerSampleGradients`; frozen parameters are left out.
        projection: an `influence.Projection` of all trainable parameters, flattened one after another; or one for
            each of some parameters, by name (`layer_projections` makes them), whose results are put side by side; or
            None for the gradients themselves, which only a small model bears.
        store: open for writing, `width` of the rows wide; `InfluenceCollector.store` makes one.
        loss: the losses of a batch's samples, (B,), from the model and the batch: `language_losses`, `class_losses`,
            `noise_losses`, or a function of one's own.
        options: of `PerSampleGradients`: `fallback`, `layout`, `batch_size`, ...

    Raises:
        ValueError: if the store has another width or holds rows of another projection, or `PerSampleGradients` refuses
            the model.

    Sources: Park et al. 2023 (TRAK, arXiv 2303.14186); Choe et al. 2024 (LoGra, arXiv 2405.13954).
    """

    def __init__(
        self,
        model: nn.Module,
        projection: Projected,
        store: GradientStore,
        *,
        loss: Losses,
        **options: Any,
    ) -> None:
        from unlearn_kernels.per_sample import PerSampleGradients

        self.model, self.projection, self.loss = model, projection, loss
        self.gradients: PerSampleGradients = PerSampleGradients(model, loss_reduction="sum", **options)
        width = row_width(self.gradients.parameters, projection)
        if store.width != width:
            raise ValueError(f"store must have rows of {width} numbers, got {store.width}")
        ours, known = described(projection), store.metadata
        if "projection" in known and known["projection"] != ours:
            raise ValueError(f"store must hold rows of projection {ours}, got {known['projection']}")
        self.into = store

    @staticmethod
    def store(
        path: str | PathLike[str],
        model: nn.Module,
        projection: Projected,
        dtype: Format = "float32",
        **options: Any,
    ) -> GradientStore:
        """Open the store at a path for writing, or make one of the right width that remembers its projection.

        Args:
            path: of a store, or where there is nothing.
            model: whose trainable parameters are projected.
            projection: as of the collector.
            dtype: of a new store's rows.
            options: of `GradientStore.create`.

        Raises:
            StoreError: as `GradientStore.open`.
        """
        if (Path(path) / MANIFEST).exists():
            return GradientStore.open(path, write=True)
        width = row_width({n: p for n, p in model.named_parameters() if p.requires_grad}, projection)
        metadata = {**options.pop("metadata", {}), "projection": described(projection)}
        return GradientStore.create(path, width, dtype, metadata=metadata, **options)

    def rows(self, batch: Any) -> Tensor:
        """The rows of a batch's samples, (B, width), for queries: nothing is stored.

        Raises:
            ValueError: if the loss does not return one number a sample.
        """
        with self.gradients as gradients, torch.enable_grad():
            losses = self.loss(self.model, batch)
            if losses.dim() != 1:
                raise ValueError(f"loss must return one number a sample, (B,), got {tuple(losses.shape)}")
            if not losses.requires_grad:
                raise ValueError("loss must depend on the model's parameters, got one without a gradient")
            losses.sum().backward()
            if len(losses) != gradients.batch.samples:
                raise ValueError(f"loss must return {gradients.batch.samples} numbers, got {len(losses)}")
            return self._projected(gradients)

    def _projected(self, gradients: PerSampleGradients) -> Tensor:
        if isinstance(self.projection, Projection):
            whole = gradients.project(self.projection)
            assert isinstance(whole, Tensor)
            return whole
        by = gradients.grads() if self.projection is None else gradients.project(self.projection)
        assert isinstance(by, dict)
        widths = part_widths(gradients.parameters, self.projection)
        some = next(iter(by.values()))
        parts = [
            by[name].flatten(1).to(some.device) if name in by else some.new_zeros(len(some), width)
            for name, width in widths.items()
        ]
        return torch.cat(parts, dim=1)

    def collect(
        self,
        dataset: Dataset,
        *,
        batch_size: int = 32,
        items: Sequence[int] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        prepare: Callable[[Any], Any] | None = None,
        metadata: Callable[[int], Any] | None = None,
        flush_every: int = 4096,
        workers: int = 0,
        progress: Progress | None = None,
    ) -> int:
        """Store the rows of all items that the store does not have yet; an item's number becomes its row's id.

        Rows are on disk after every `flush_every`, at the end, and when an error ends the run. A run that was killed is
        called again in the same way: what was on disk is skipped, so that no row is there twice and none is missing.
        A row that was deleted from the store is collected again unless `items` leaves it out.

        Args:
            dataset: samples by number.
            batch_size: how many to take at once.
            items: numbers of those to collect, all different; None: all. Processes that share the work each take their
                own, into a store of their own.
            collate: makes a batch of a list of samples; None: torch's default.
            prepare: what is done to a batch before the loss, such as moving it to a device.
            metadata: JSON to be stored with an item, by its number.
            flush_every: rows that a killed run loses at most.
            workers: of the `DataLoader`.
            progress: called with the rows that are there and all that there will be, before the first batch and after
                each.

        Returns:
            How many rows were added.

        Raises:
            ValueError: if a number is out of range or given twice, or as `rows`.
            StoreError: if the store is not open for writing.
        """
        wanted = self._wanted(dataset, items, batch_size, flush_every)
        self.into.flush()
        known = set(self.into.ids().tolist())
        left = [i for i in wanted if i not in known]
        before, added = len(wanted) - len(left), 0
        report = progress or (lambda done, total: None)
        report(before, len(wanted))
        waiting = 0
        try:
            for ids, batch in _batches(dataset, left, batch_size, collate, workers):
                rows = self.rows(batch if prepare is None else prepare(batch))
                if len(rows) != len(ids):
                    raise ValueError(f"collate must keep the {len(ids)} samples of a batch, got {len(rows)}")
                notes = None if metadata is None else [metadata(i) for i in ids]
                self.into.append(rows, torch.tensor(ids), notes)
                added, waiting = added + len(ids), waiting + len(ids)
                if waiting >= flush_every:
                    self.into.flush()
                    waiting = 0
                report(before + added, len(wanted))
        finally:
            self.into.flush()
        return added

    @staticmethod
    def _wanted(
        dataset: Dataset, items: Sequence[int] | None, batch_size: int, flush_every: int
    ) -> list[int]:
        for name, value in (("batch_size", batch_size), ("flush_every", flush_every)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        size = len(dataset)
        wanted = list(range(size)) if items is None else [int(i) for i in items]
        if outside := [i for i in wanted if not 0 <= i < size]:
            raise ValueError(f"items must be in [0, {size}), got {outside[0]}")
        if len(set(wanted)) != len(wanted):
            twice = next(i for i, count in Counter(wanted).items() if count > 1)
            raise ValueError(f"items must be different numbers, got {twice} more than once")
        return wanted


def _batches(
    dataset: Dataset,
    items: list[int],
    batch_size: int,
    collate: Callable[[list[Any]], Any] | None,
    workers: int,
) -> Iterator[tuple[list[int], Any]]:
    ids = [items[i : i + batch_size] for i in range(0, len(items), batch_size)]
    loader: Any = DataLoader(dataset, batch_sampler=ids, collate_fn=collate, num_workers=workers)  # type: ignore[arg-type]
    yield from zip(ids, loader, strict=True)


def part_widths(
    parameters: Mapping[str, nn.Parameter], projection: Mapping[str, Projection | TwoSided] | None
) -> dict[str, int]:
    """How many numbers of a row are each parameter's, in their order."""
    if projection is None:
        return {name: p.numel() for name, p in parameters.items()}
    if not projection:
        raise ValueError("projection must not be empty")
    return {
        name: p.k if isinstance(p, Projection) else len(p.left) * len(p.right)
        for name, p in projection.items()
    }


def row_width(parameters: Mapping[str, nn.Parameter], projection: Projected) -> int:
    """How many numbers a row has."""
    if isinstance(projection, Projection):
        return projection.k
    return sum(part_widths(parameters, projection).values())


def described(projection: Projected) -> Any:
    """A projection as JSON: equal for those that give the same rows, which a mapping puts together in its order."""
    if projection is None:
        return None
    if isinstance(projection, Projection):
        return repr(projection)
    return [
        [name, repr(p) if isinstance(p, Projection) else [_checksum(p.left), _checksum(p.right)]]
        for name, p in projection.items()
    ]


def _checksum(x: Tensor) -> list[int]:
    return [*x.shape, zlib.crc32(x.detach().cpu().double().contiguous().numpy().tobytes())]

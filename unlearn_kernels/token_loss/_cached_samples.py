"""Samples of a reference cache as losses ask for them, by key."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unlearn_kernels import _files
from unlearn_kernels._files import StoreError
from unlearn_kernels.token_loss import _cache_files as files
from unlearn_kernels.token_loss._cache_files import Key, Manifest, Shard
from unlearn_kernels.token_loss._public import Reference
from unlearn_kernels.token_loss._samples import plain_keys


class CachedSamples:
    """The samples that the manifest of a folder names."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.fingerprint = path, manifest.fingerprint
        self._manifest = manifest
        self._places: dict[Key, tuple[Shard, int]] = {}
        self._heads: dict[torch.device, tuple[Tensor, Tensor | None]] = {}
        for info in manifest.shards:
            self._take_in(Shard(path, info, manifest))

    def _take_in(self, shard: Shard) -> None:
        self._places.update({key: (shard, row) for row, key in enumerate(shard.keys)})

    def sequence_nll(
        self, keys: Sequence[Key], labels: Tensor | None = None, *, ignore_index: int = -100
    ) -> Tensor:
        """Sums of negative log-likelihoods under the reference, (B,): `reference_nll` of `npo` and `dpo`.

        Args:
            keys: of the samples.
            labels: (B, T), shifted, of the same samples; checked against those of the reference.
            ignore_index: the label of tokens that do not count.

        Returns:
            (B,) float64, on the device of `labels`.

        Raises:
            KeyError: if a sample is not there.
            StoreError: if a sample had other labels when the reference saw it.
        """
        places = self._found(keys, labels, ignore_index)
        sums = torch.stack([shard.sums[row] for shard, row in places]) if places else torch.zeros(0).double()
        return sums if labels is None else sums.to(labels.device)

    def token_nll(self, keys: Sequence[Key], labels: Tensor, *, ignore_index: int = -100) -> Tensor:
        """Negative log-likelihoods of the tokens under the reference, (B, T): `reference_nll` of `tnpo` and `wtnpo`.

        As `linear_nll` returned them: wherever the padding is, 0 where a label does not count.

        Args:
            keys: of the samples.
            labels: (B, T), shifted.
            ignore_index: the label of tokens that do not count.

        Raises:
            KeyError: if a sample is not there.
            StoreError: if a sample had other labels when the reference saw it, or the cache keeps sums alone.
        """
        if not self._manifest.with_tokens:
            raise StoreError(f"{self.path} keeps sums alone: build it with tokens=True")
        places = self._found(keys, labels, ignore_index)
        parts = [shard.nll[shard.tokens(row)] for shard, row in places if shard.nll is not None]
        return _spread(parts, labels, ignore_index, (), self._manifest.dtype)

    def reference(self, keys: Sequence[Key], labels: Tensor, *, ignore_index: int = -100) -> Reference:
        """Hidden states and head of the reference: `reference` of `linear_kl`, `kl_retain`, `undial` and their like.

        Rows that do not count are 0, so that the loss must leave them out: `labels=`, or `fixed=True` of `undial`.
        For a divergence over prompts too, build the cache of batches without labels and give `input_ids[:, 1:]` here,
        with padding ignored.

        Args:
            keys: of the samples.
            labels: (B, T), shifted.
            ignore_index: the label of rows that do not count.

        Returns:
            Hidden states (B, T, d'), head (V, d') and bias (V,) or None, in the reference's dtypes, on the device of
            `labels`, where the head then stays.

        Raises:
            KeyError: if a sample is not there.
            StoreError: if a sample had other labels when the reference saw it, or the cache has no hidden states.
        """
        if not self._manifest.with_hidden:
            raise StoreError(f"{self.path} has no hidden states: build it with hidden=True")
        places = self._found(keys, labels, ignore_index)
        parts = [shard.hidden[shard.tokens(row)] for shard, row in places if shard.hidden is not None]
        h = _spread(parts, labels, ignore_index, (self._manifest.width,), self._manifest.states)
        return h, *self._head(labels.device)

    def _head(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        if device not in self._heads:
            W, bias = files.read_head(self.path, self._manifest)
            self._heads[device] = W.to(device), None if bias is None else bias.to(device)
        return self._heads[device]

    def _found(
        self, keys: Sequence[Key], labels: Tensor | None, ignore_index: int
    ) -> list[tuple[Shard, int]]:
        keys = plain_keys(keys)
        if labels is not None and (labels.dim() != 2 or len(labels) != len(keys)):
            raise ValueError(f"labels must have shape ({len(keys)}, T), got {tuple(labels.shape)}")
        kept = None if labels is None else labels.long() != ignore_index
        places = []
        for i, key in enumerate(keys):
            if key not in self._places:
                raise KeyError(f"{self.path} has no sample {key!r}; build goes on where it ended")
            shard, row = self._places[key]
            if labels is not None and kept is not None:
                own = labels[i][kept[i]]
                if len(own) != int(shard.lengths[row]) or files.digest_of(own) != int(shard.digests[row]):
                    raise StoreError(
                        f"labels of sample {key!r} are not those that the reference saw "
                        f"({len(own)} count, {int(shard.lengths[row])} did): build a new cache for this data"
                    )
            places.append((shard, row))
        return places

    def verify(self) -> None:
        """Read everything and compare checksums.

        Raises:
            StoreError: if a file is damaged.
        """
        for info in self._manifest.shards:
            for name, (size, crc) in info.files.items():
                _files.check_bytes(self.path / info.name / name, size, crc)
        for name, (size, crc) in self._manifest.head_files.items():
            _files.check_bytes(self.path / files.HEAD / name, size, crc)


def _spread(
    parts: list[Tensor], labels: Tensor, ignore_index: int, tail: tuple[int, ...], dtype: str | None
) -> Tensor:
    """Tokens that count, put where their labels are."""
    target = getattr(torch, dtype or "float32")
    out = torch.zeros(*labels.shape, *tail, dtype=target, device=labels.device)
    if parts:
        out[labels.long() != ignore_index] = torch.cat(parts).to(labels.device)
    return out

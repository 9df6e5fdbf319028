"""Likelihoods, and hidden states, of a frozen reference model on disk; `_cached_samples` gives them back."""

import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import IO, Any, Final

from torch import Tensor, nn

from unlearn_kernels import _files
from unlearn_kernels._files import StoreError
from unlearn_kernels.token_loss import _cache_files as files
from unlearn_kernels.token_loss._cache_files import Key, Manifest, Sample, Shard
from unlearn_kernels.token_loss._cached_samples import CachedSamples
from unlearn_kernels.token_loss._models import evaluating
from unlearn_kernels.token_loss._options import counting
from unlearn_kernels.token_loss._samples import UNKNOWN, inputs_of, keys_of, plain_key, plain_keys
from unlearn_kernels.token_loss.adapters import fingerprint
from unlearn_kernels.token_loss.hidden import HiddenRows, MakeRows, hidden_rows
from unlearn_kernels.token_loss.linear import linear_nll

Progress = Callable[[int], None]
# When what came together goes to disk.
_FLUSH_BYTES: Final = 1 << 28
_FLUSH_SECONDS: Final = 30.0


class ReferenceCache(CachedSamples):
    """What losses need of a frozen reference, computed once: the model itself can then be given back.

    Of every sample the sum of its tokens' negative log-likelihoods (NPO, DPO), of every token that counts its own
    (TNPO), and if wanted its hidden states, with the reference's head once (KL, UNDIAL): d numbers a token that give
    the reference's whole distribution, where a cache of the k likeliest words would not. Everything is kept as it
    was computed, to the bit, with checksums of the tokens and labels it belongs to.

    Keys are integers or strings, one at a time or in lists, arrays and tensors.

    One process writes at a time. A writer that is killed loses what it had not flushed, and `build` goes on from there.

    Attributes:
        path: the folder.
        fingerprint: of the model that made it, see `unlearn_kernels.token_loss.fingerprint`.
    """

    def __init__(self, path: Path, manifest: Manifest, lock: IO[str] | None) -> None:
        super().__init__(path, manifest)
        self._lock = lock
        self._pending: dict[Key, Sample] = {}
        self._pending_bytes, self._flushed = 0, time.monotonic()

    @classmethod
    def create(
        cls, path: str | PathLike[str], model: nn.Module | str, *, tokens: bool = True, hidden: bool = False
    ) -> "ReferenceCache":
        """Make an empty cache, open for writing.

        Args:
            path: a folder that does not exist or is empty.
            model: the reference, or its fingerprint. Adapters that are off do not count.
            tokens: keep likelihoods of single tokens, 4 bytes each.
            hidden: keep hidden states, and the head.

        Raises:
            FileExistsError: if the folder holds something.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"path must be empty, got {folder}")
        Manifest(_fingerprint(model), tokens, hidden).write(folder)
        return cls.open(folder, None, write=True)

    @classmethod
    def open(
        cls, path: str | PathLike[str], model: nn.Module | str | None, *, write: bool = False
    ) -> "ReferenceCache":
        """Open a cache.

        Args:
            path: its folder.
            model: the reference or its fingerprint, which must be that of the cache; None trusts it.
            write: also to add samples; what a killed writer left half done is cleared away.

        Raises:
            StoreError: if the folder is no cache, a file is missing, truncated or foreign, another model made it, or
                another process writes.
        """
        folder = Path(path)
        manifest = Manifest.read(folder)
        if model is not None:
            _check_model(folder, manifest, _fingerprint(model))
        lock = _files.locked(folder) if write else None
        if write:
            manifest = Manifest.read(folder)
            known = {info.name for info in manifest.shards} | ({files.HEAD} if manifest.head else set())
            for child in folder.iterdir():
                if child.is_dir() and child.name not in known:
                    shutil.rmtree(child)
        return cls(folder, manifest, lock)

    @classmethod
    def build(
        cls,
        path: str | PathLike[str],
        model: nn.Module,
        batches: Iterable[Any],
        *,
        tokens: bool = True,
        hidden: bool = False,
        key: str = "index",
        rows: MakeRows = hidden_rows,
        progress: Progress | None = None,
    ) -> "ReferenceCache":
        """Run a model over a data set once and keep what losses need of it, or go on where an earlier call was killed.

        Batches whose samples are all there are skipped without a forward pass, if their tokens are still the same. The
        model runs without gradients, in evaluation mode, and every module is left in the mode it was in.

        Args:
            path: the folder, new or that of an earlier call.
            model: the reference; under PEFT inside `adapter_off`.
            batches: mappings with the model's inputs, `labels` if not all tokens count, and a key for each sample.
            tokens: keep likelihoods of single tokens.
            hidden: keep hidden states of the tokens that count, and the head.
            key: under which name a batch has its samples' keys, integers or strings.
            rows: what makes hidden states of a batch.
            progress: called with the number of samples that are there.

        Returns:
            The cache, closed for writing.

        Raises:
            ValueError: if a batch has no keys, or others than integers and strings.
            StoreError: as `open`; if the folder keeps something else than what is asked for here; or if a key comes
                with other `input_ids` (those that `attention_mask` keeps) or labels than before, in this call or an
                earlier one. Caches of an earlier commit do not know their `input_ids`.
        """
        cache = cls._resumed(Path(path), model, tokens, hidden)
        try:
            with evaluating(model):
                for batch in batches:
                    keys = keys_of(batch, key)
                    if all(k in cache for k in keys):
                        cache._check_inputs(keys, inputs_of(batch, len(keys)))
                    else:
                        cache.add(keys, rows(model, batch), batch)
                    if progress is not None:
                        progress(len(cache))
            cache.flush()
        finally:
            cache.close()
        return cache

    @classmethod
    def _resumed(cls, folder: Path, model: nn.Module, tokens: bool, hidden: bool) -> "ReferenceCache":
        if not (folder / files.MANIFEST).exists():
            return cls.create(folder, model, tokens=tokens, hidden=hidden)
        cache = cls.open(folder, model, write=True)
        found = cache._manifest.with_tokens, cache._manifest.with_hidden
        if found != (tokens, hidden):
            cache.close()
            raise StoreError(
                f"{folder} keeps tokens={found[0]}, hidden={found[1]}, asked for were tokens={tokens}, hidden={hidden}"
            )
        return cache

    def __enter__(self) -> "ReferenceCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def __contains__(self, key: Key) -> bool:
        key = plain_key(key)
        return key in self._places or key in self._pending

    def keys(self) -> list[Key]:
        """Keys of all samples, in the order of writing."""
        return [*self._places, *self._pending]

    def close(self) -> None:
        """Flush and let others write."""
        if self._lock is not None:
            try:
                self.flush()
            finally:
                self._lock.close()
                self._lock = None

    def _writable(self) -> None:
        if self._lock is None:
            raise StoreError(f"{self.path} is not open for writing: pass write=True to open")

    def add(self, keys: Sequence[Key], rows: HiddenRows, batch: Any = None) -> None:
        """Take in samples; those that are there already are left as they are.

        They are safe on disk after `flush`, which comes by itself every 30 seconds or 256 MB.

        Args:
            keys: one a sequence, integers or strings.
            rows: hidden states of the reference, its head, and shifted labels.
            batch: what these were made of: its `input_ids` are remembered by a checksum.

        Raises:
            ValueError: if there are not as many keys as sequences, or others than integers and strings.
            StoreError: if the cache is not open for writing, keeps numbers of another type, or has a sample of that
                key with other tokens or labels.
        """
        self._writable()
        keys = plain_keys(keys)
        if len(keys) != len(rows.labels):
            raise ValueError(f"keys must be one a sequence, {len(rows.labels)}, got {len(keys)}")
        nll = linear_nll(rows.h.detach(), rows.W.detach(), rows.labels, **rows.options).detach().cpu()
        self._fix_types(nll, rows)
        kept = counting(rows.labels, rows.options)
        inputs = inputs_of(batch, len(keys))
        digests = [files.digest_of(y[k]) for y, k in zip(rows.labels, kept, strict=True)]
        for i, key in enumerate(keys):
            if key in self:
                self._check_inputs([key], inputs[i : i + 1], digests[i : i + 1])
            else:
                hidden = rows.h[i][kept[i]].detach().cpu() if self._manifest.with_hidden else None
                self._pend(Sample(key, digests[i], inputs[i], nll[i][kept[i].cpu()], hidden))
        if self._pending_bytes >= _FLUSH_BYTES or time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def _pend(self, sample: Sample) -> None:
        self._pending[sample.key] = sample
        self._pending_bytes += sample.nll.nbytes + (0 if sample.hidden is None else sample.hidden.nbytes)

    def _check_inputs(self, keys: list[Key], inputs: list[int], digests: list[int] | None = None) -> None:
        """Whether samples that are there were made of these tokens and labels, as far as they are known."""
        for i, key in enumerate(keys):
            seen, digest = self._seen(key)
            same = digests is None or digests[i] == digest
            if not same or (seen != inputs[i] and UNKNOWN not in (seen, inputs[i])):
                raise StoreError(
                    f"sample {key!r} was made of other tokens or labels: build a new cache for this data, and give "
                    "every sample a key of its own"
                )

    def _seen(self, key: Key) -> tuple[int, int]:
        """Checksums of the tokens and of the labels that count."""
        if key in self._pending:
            return self._pending[key].inputs, self._pending[key].digest
        shard, row = self._places[key]
        return int(shard.inputs[row]), int(shard.digests[row])

    def _fix_types(self, nll: Tensor, rows: HiddenRows) -> None:
        """The first samples say of which types a cache's numbers are, and bring the head."""
        m, dtype, states = self._manifest, files.name_of(nll.dtype), files.name_of(rows.h.dtype)
        if m.dtype is None:
            m.dtype = dtype
            if m.with_hidden:
                m.width, m.states = rows.h.shape[-1], states
                files.write_head(self.path, m, rows.W, rows.options.get("bias"))
            m.write(self.path)
        if m.dtype != dtype or (m.with_hidden and (m.width, m.states) != (rows.h.shape[-1], states)):
            raise StoreError(
                f"{self.path} keeps likelihoods of {m.dtype} and hidden states of {m.states}, width {m.width}, "
                f"got {dtype} and {states}, width {rows.h.shape[-1]}"
            )

    def flush(self) -> None:
        """Write what was added as a new shard.

        Raises:
            StoreError: if the cache is not open for writing.
        """
        self._writable()
        self._flushed = time.monotonic()
        if not self._pending:
            return
        info = files.write_shard(self.path, self._manifest, list(self._pending.values()))
        self._manifest.shards.append(info)
        self._manifest.write(self.path)
        self._pending, self._pending_bytes = {}, 0
        self._take_in(Shard(self.path, info, self._manifest))

    def _found(
        self, keys: Sequence[Key], labels: Tensor | None, ignore_index: int
    ) -> list[tuple[Shard, int]]:
        keys = plain_keys(keys)
        if self._pending and not self._pending.keys().isdisjoint(keys):
            self.flush()
        return super()._found(keys, labels, ignore_index)


def _fingerprint(model: nn.Module | str) -> str:
    return model if isinstance(model, str) else fingerprint(model)


def _check_model(folder: Path, manifest: Manifest, found: str) -> None:
    if manifest.fingerprint != found:
        raise StoreError(
            f"{folder} was made by another model: its fingerprint is {manifest.fingerprint[:12]}, this model's "
            f"{found[:12]}. Load the weights and the dtype that made it, with adapters off if it was made of a base "
            "model, or build a new cache"
        )

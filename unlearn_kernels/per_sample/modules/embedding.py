"""Embeddings, and what their gradients have in common with those of a head that shares their weight."""

import torch
from torch import Tensor, nn

from unlearn_kernels.influence import Projection
from unlearn_kernels.per_sample import embedding
from unlearn_kernels.per_sample._types import TwoSided
from unlearn_kernels.per_sample.modules.layer import Kept, Layer, only
from unlearn_kernels.per_sample.modules.linear import LinearUse, flat
from unlearn_kernels.per_sample.modules.use import Use, widened


class EmbeddingUse(Use):
    """Row v of `E_i` is the sum of `g_t` over the tokens t with id v. Kept as ids (B, T) and G (B, T, d)."""

    def __init__(self, ids: Tensor, G: Tensor, num_embeddings: int, padding_idx: int | None) -> None:
        self.ids, self.G = ids, G
        self.num_embeddings, self.padding_idx = num_embeddings, padding_idx

    @property
    def samples(self) -> int:
        return self.G.shape[0]

    @property
    def device(self) -> torch.device:
        return self.G.device

    def sqnorms(self) -> Tensor:
        return embedding.sqnorms(
            self.ids, self.G, num_embeddings=self.num_embeddings, padding_idx=self.padding_idx
        )

    def grads(self) -> Tensor:
        return embedding.grads(
            self.ids, self.G, num_embeddings=self.num_embeddings, padding_idx=self.padding_idx
        ).weight

    def rows(self, part: slice) -> Use:
        return EmbeddingUse(self.ids[part], self.G[part], self.num_embeddings, self.padding_idx)

    def weighted_sum(self, w: Tensor) -> Tensor:
        return embedding.weighted_sum(
            self.ids, self.G, w, num_embeddings=self.num_embeddings, padding_idx=self.padding_idx
        ).weight

    def project(self, projection: Projection | TwoSided) -> Tensor:
        return embedding.project(
            self.ids, self.G, projection, num_embeddings=self.num_embeddings, padding_idx=self.padding_idx
        )

    def project_part(self, projection: Projection, offset: int) -> Tensor:
        return embedding.project_part(
            self.ids, self.G, projection, offset, self.num_embeddings, self.padding_idx
        )

    def joined(self, other: Use) -> Use | None:
        if not isinstance(other, EmbeddingUse) or other.padding_idx != self.padding_idx:
            return None
        ids, G = torch.cat([self.ids, other.ids], dim=1), torch.cat([self.G, other.G], dim=1)
        return EmbeddingUse(ids, G, self.num_embeddings, self.padding_idx)

    def known_dots(self, other: Use, summed: bool) -> Tensor | None:
        if isinstance(other, EmbeddingUse) and other.padding_idx == self.padding_idx:
            return embedding.dots(
                self.ids,
                self.G,
                other.ids,
                other.G,
                num_embeddings=self.num_embeddings,
                padding_idx=self.padding_idx,
                summed=summed,
            )
        if isinstance(other, LinearUse):
            pairs = [[self._tied(i, other, j) for j in range(other.samples)] for i in range(self.samples)]
            table = torch.stack([torch.stack(row) for row in pairs])
            return table.sum(1) if summed else table
        return None

    def known_pairs(self, other: Use) -> Tensor | None:
        if not isinstance(other, LinearUse):
            return None
        return torch.stack([self._tied(i, other, i) for i in range(self.samples)])

    def _tied(self, i: int, head: LinearUse, j: int) -> Tensor:
        """`<E_i, H_j> = sum_{t,s} q_s[id_t] (g_t . h_s)`, with the head's inputs h and output gradients q."""
        ids, g = self.ids[i], widened(self.G[i])
        if self.padding_idx is not None:
            g = g * (ids != self.padding_idx)[:, None]
        return (head.G[j].T[ids] * (g @ head.A[j].to(g.dtype).T)).sum()


class EmbeddingLayer(Layer):
    """`nn.Embedding`, and its subclasses that multiply the output by `embed_scale`."""

    kind = "embedding"

    def __init__(self, path: str, module: nn.Embedding, wanted: frozenset[str]) -> None:
        super().__init__(path, module, wanted)
        self.num_embeddings, self.padding_idx = module.num_embeddings, module.padding_idx
        self.scale = getattr(module, "embed_scale", 1.0)

    def check(self, kept: tuple[Tensor, ...], output: Tensor) -> None:
        (ids,) = kept
        if ids.shape != output.shape[:-1]:
            shapes = f"ids {tuple(ids.shape)} and outputs {tuple(output.shape)}"
            raise ValueError(f"{self.path}: an embedding does not understand {shapes}")

    def uses(self, kept: Kept, grads: tuple[Tensor | None, ...]) -> dict[str, Use]:
        G = flat(only(grads))
        if isinstance(self.scale, Tensor) or self.scale != 1.0:
            G = G * self.scale
        return {
            "weight": EmbeddingUse(
                kept.tensors[0].reshape(G.shape[:2]), G, self.num_embeddings, self.padding_idx
            )
        }

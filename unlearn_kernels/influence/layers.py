"""A projection for each of a model's parameters."""

from typing import Literal

from torch import nn

from unlearn_kernels.influence.projection import Projection


def layer_projections(
    model: nn.Module,
    k: int,
    kind: Literal["tensorsketch", "two_sided"] = "tensorsketch",
    seed: int = 0,
    *,
    vectors: bool = True,
) -> dict[str, Projection]:
    """Return projections of a model's trainable parameters, each with a seed of its own, for `InfluenceCollector`.

    Those of matrices are taken from the factors of a layer's gradients: their cost does not grow with the product
    of its sides. An embedding's goes by the rows that a batch touches.

    Args:
        model: whose parameters that require grad are projected.
        k: numbers a parameter, a power of two, for `two_sided` one of four: `sqrt(k)` a side.
        kind: of weights with two dimensions or more, an embedding's apart; a convolution's is taken as the matrix
            (O, C / groups * kernel). The others get `sjlt`.
        seed: of the first parameter; the following count on.
        vectors: whether biases and scales are projected too, to at most `k` numbers each.

    Returns:
        Projections by the parameters' names.

    Raises:
        ValueError: if `k` is no such power, or no parameter requires grad.
    """
    if k < 1 or k & (k - 1) or (kind == "two_sided" and k.bit_length() % 2 == 0):
        raise ValueError(f"k must be a power of {'four' if kind == 'two_sided' else 'two'}, got {k}")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[str, Projection] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad or (p.dim() < 2 and not vectors):
            continue
        own = seed + len(found)
        if p.dim() < 2 or id(p) in tables:
            found[name] = Projection(p.numel(), min(k, p.numel()), "sjlt", own)
        else:
            found[name] = _of_matrix((p.shape[0], p.numel() // p.shape[0]), k, kind, own)
    if not found:
        raise ValueError("model must have parameters that require grad and can be projected, got none")
    return found


def _of_matrix(shape: tuple[int, int], k: int, kind: str, seed: int) -> Projection:
    dim = shape[0] * shape[1]
    if kind == "tensorsketch":
        return Projection(dim, k, "tensorsketch", seed, shape=shape)
    side = 1 << (k.bit_length() // 2)
    return Projection(dim, k, "two_sided", seed, shape=shape, sides=(side, side))

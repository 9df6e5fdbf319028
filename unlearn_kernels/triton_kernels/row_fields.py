"""A few numbers a row, in float64: fields from the parts of a sweep, and coefficients of the gradient from fields.

The gradient of fields to a row's logits is, with p and q the distributions of policy and reference,

    p (a + s log p + t log q) + b q + m [v = mark] + e, and c where v is the label.
"""

from typing import Final

import torch
from torch import Tensor

from unlearn_kernels.reference.token_rows import PAIR, PAIR_FIELDS, STAT_FIELDS, STATS

COEFFICIENTS: Final = ("lse", "tail", "ref_lse", "ref_tail", "a", "s", "t", "b", "c", "m", "e")


def fields_of(
    kind: int, parts: Tensor, labels: Tensor, vocabulary: int, beta: float
) -> tuple[list[Tensor], Tensor]:
    """Fields of rows and their most likely words, from parts (numbers, splits, N) in the order of the kernels."""
    single, parts = parts.dtype == torch.float32, parts.double()
    labelled = labels >= 0
    # A label out of range is no word's: NaN, because a check would stall the device.
    bad = torch.where(labels >= vocabulary, torch.nan, 0.0)
    if kind == STATS:
        found, words = _stat_fields(parts, labels, labelled, bad, vocabulary)
        return _with_tails(found, STAT_FIELDS, single), words
    if kind == PAIR:
        return _with_tails(_pair_fields(parts, labelled, bad, beta), PAIR_FIELDS, single), labels
    return [parts[0].sum(0)], labels


def _shift(peak: Tensor) -> Tensor:
    return torch.where(peak.isinf(), 0.0, peak)


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return torch.where(weight == 0, 0.0, weight * x)


def _joined(peaks: Tensor, *sums: Tensor) -> tuple[Tensor, ...]:
    """Peak, and sums of weights e^(z - peak) times powers of z - peak, of all splits together."""
    peak = peaks.amax(0)
    by = _shift(peaks) - _shift(peak)
    factor, mass = by.exp(), sums[0]
    found = [peak, (factor * mass).sum(0)]
    if len(sums) > 1:
        found.append((factor * (sums[1] + by * mass)).sum(0))
    if len(sums) > 2:
        found.append((factor * (sums[2] + by * (2 * sums[1] + by * mass))).sum(0))
    return tuple(found)


def _split(z: Tensor, peak: Tensor, mass: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lse, nll, p and 1 - p of a label with logit z against the rest of the words."""
    rest = _shift(peak) + mass.log()
    top = _shift(torch.maximum(z, peak))
    joint = top + (mass * (_shift(peak) - top).exp() + (z - top).exp()).log()
    plain = torch.where(mass == 0, z - z, joint - z)
    special = z.isinf() | peak.isinf() | mass.isinf()
    gap = torch.log1p(mass * (peak - z).exp())
    gap = torch.where(gap.isinf(), rest - z, gap)
    nll = torch.where(special, plain, gap)
    lse = torch.where(special, joint, z + gap)
    lse, nll = torch.where(labelled, lse, rest), torch.where(labelled, nll, 0.0)
    p = torch.where(labelled, (-nll).exp(), 0.0)
    return lse, nll, p, torch.where(labelled, -torch.expm1(-nll), 1.0)


def _tail(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x - x.float().double(), 0.0)


def _with_tails(fields: dict[str, Tensor], names: tuple[str, ...], single: bool) -> list[Tensor]:
    """In order, with what rounding to fp32 will take from the log-sum-exps."""
    for name in ("lse", "ref_lse"):
        if name in fields:
            fields[f"{name}_tail"] = _tail(fields[name]) if single else torch.zeros_like(fields[name])
    return [fields[name] for name in names]


def _stat_fields(
    parts: Tensor, labels: Tensor, labelled: Tensor, bad: Tensor, vocabulary: int
) -> tuple[dict[str, Tensor], Tensor]:
    found, tops, seconds, indices, *sums, totals = parts
    peak, mass, first, square = _joined(tops, *sums)
    z = torch.where(labelled, found.sum(0), -torch.inf)
    lse, nll, p, rest = _split(z, peak, mass, labelled)
    center = torch.where(mass == 0, 0.0, _shift(peak) + first / mass)
    spread = torch.where(mass == 0, 0.0, square / mass - (first / mass) ** 2)
    own, apart = torch.where(labelled, z - lse, 0.0), center - lse
    mean = _times(p, own) + _times(rest, apart)
    variance = _times(rest, spread) + _times(_times(p, rest), (own - apart) ** 2)
    best, second, words = _best(tops, seconds, indices, z, labels, labelled)
    nan = torch.where(lse.isnan(), lse, 0.0)
    fields = {
        "nll": nll + bad,
        "lse": lse,
        "mean": mean,
        "std": variance.clamp_min(0).sqrt(),
        "margin": best - second + nan,
        "peak": best + nan,
        "average": totals.sum(0) / vocabulary,
        "ceu": torch.where(labelled, -apart, 0.0) + bad,
    }
    return fields, words


def _best(
    tops: Tensor, seconds: Tensor, indices: Tensor, z: Tensor, labels: Tensor, labelled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The largest two logits and the first word that has the largest."""
    top, split = tops.max(0)
    first = (tops == top).to(torch.int8).argmax(0, keepdim=True)
    word = indices.gather(0, first)[0].long()
    others = torch.cat([seconds, tops.scatter(0, split[None], -torch.inf)]).amax(0)
    ahead = labelled & ((z > top) | ((z == top) & (labels < word)))
    second = torch.where(ahead, top, torch.maximum(others, z))
    return torch.where(ahead, z, top), second, torch.where(ahead, labels, word)


def _pair_fields(parts: Tensor, labelled: Tensor, bad: Tensor, beta: float) -> dict[str, Tensor]:
    found, ref_found, p_peaks, p_mass, p_first, p_gap, q_peaks, q_mass, q_first, q_gap = parts
    peak, mass, first = _joined(p_peaks, p_mass, p_first)
    ref_peak, ref_mass, ref_first = _joined(q_peaks, q_mass, q_first)
    z, r = (torch.where(labelled, x.sum(0), -torch.inf) for x in (found, ref_found))
    lse, nll, p, rest = _split(z, peak, mass, labelled)
    ref_lse, ref_nll, q, ref_rest = _split(r, ref_peak, ref_mass, labelled)
    between = lse - ref_lse
    p_rest = _times(rest, _joined(p_peaks, p_gap)[1] / mass - between)
    q_rest = _times(ref_rest, _joined(q_peaks, q_gap)[1] / ref_mass + between)
    own = ref_nll - nll
    ref_mean = _shift(ref_peak) + ref_first / ref_mass - ref_lse
    kept, lowered = _lowered(ref_nll, labelled, beta)
    soft = _times(q_rest - _times(ref_rest, ref_mean), kept) + _times(lowered, nll)
    return {
        "nll": nll + bad,
        "lse": lse,
        "mean": _times(p, -nll) + _times(rest, _shift(peak) + first / mass - lse),
        "kl": _times(q, -own) + q_rest,
        "reverse_kl": _times(p, own) + p_rest,
        "soft": soft + bad,
        "ref_nll": ref_nll,
        "ref_lse": ref_lse,
        "ref_mean": _times(q, -ref_nll) + _times(ref_rest, ref_mean),
    }


def _lowered(ref_nll: Tensor, labelled: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """What softmax(r - beta onehot) is at other words, as a multiple of q, and at the label."""
    at = (-ref_nll - beta).exp()
    mass = torch.ones_like(at) if beta == 0 else -torch.expm1(-ref_nll) + at
    return torch.where(labelled, 1 / mass, 1.0), torch.where(labelled, at / mass, 0.0)


def coefficients(
    kind: int, fields: Tensor, upstream: Tensor, labels: Tensor, vocabulary: int, beta: float
) -> Tensor:
    """`COEFFICIENTS` of every row, (11, N) in float64, for upstream gradients to fields (F, N)."""
    values, up = fields.double(), upstream.double()
    labelled = labels >= 0
    bad = torch.where(labels >= vocabulary, torch.nan, 0.0)
    if kind == STATS:
        found = _stat_slopes(values, up, labelled, vocabulary)
    elif kind == PAIR:
        found = _pair_slopes(values, up, labelled, beta)
    else:
        found = {"a": up[0]}
    zero = torch.zeros_like(up[0])
    found["a"] = found["a"] + bad
    return torch.stack([found.get(name, zero) for name in COEFFICIENTS])


def _stat_slopes(values: Tensor, up: Tensor, labelled: Tensor, vocabulary: int) -> dict[str, Tensor]:
    row, d = (dict(zip(STAT_FIELDS, x, strict=True)) for x in (values, up))
    nll, p, rest = row["nll"], (-row["nll"]).exp(), -torch.expm1(-row["nll"])
    d_nll, d_ceu = (torch.where(labelled, d[name], 0.0) for name in ("nll", "ceu"))
    # The gradient of ceu is -p_y times the distribution of the rest; alone it is formed as such.
    alone = (d_ceu != 0) & (d_nll == 0) & (d["lse"] == 0) & (d["mean"] == 0)
    lse = row["lse"] + row["lse_tail"] + torch.where(alone, rest.log(), 0.0)
    mixed = d_nll + d["lse"] - d["mean"] * row["mean"] - torch.where(d_ceu == 0, 0.0, d_ceu * p / rest)
    even = d["average"] / vocabulary
    at_label = _times(p, d["lse"] + d_ceu + _times(d["mean"], -nll - row["mean"])) - _times(d_nll, rest)
    return {
        "lse": lse.float().double(),
        "tail": _tail(lse),
        "a": torch.where(alone, -d_ceu * p, mixed),
        "s": d["mean"],
        "c": at_label + even,
        "m": d["peak"],
        "e": even,
    }


def _pair_slopes(values: Tensor, up: Tensor, labelled: Tensor, beta: float) -> dict[str, Tensor]:
    row, d = (dict(zip(PAIR_FIELDS, x, strict=True)) for x in (values, up))
    nll, ref_nll, back, mean = (row[name] for name in ("nll", "ref_nll", "reverse_kl", "mean"))
    d_nll = torch.where(labelled, d["nll"], 0.0)
    p = (-nll).exp()
    kept, lowered = _lowered(ref_nll, labelled, beta)
    slopes = d["lse"] + _times(d["reverse_kl"], ref_nll - nll - back) + _times(d["mean"], -nll - mean)
    at_label = _times(d_nll, torch.expm1(-nll)) + _times(d["soft"], p - lowered) + _times(p, slopes)
    at_label = at_label + _times(d["kl"], torch.expm1(-nll) - torch.expm1(-ref_nll))
    sums = d_nll + d["lse"] + d["kl"] + d["soft"]
    return {
        "lse": row["lse"],
        "tail": row["lse_tail"],
        "ref_lse": row["ref_lse"],
        "ref_tail": row["ref_lse_tail"],
        "a": sums - _times(d["reverse_kl"], back) - _times(d["mean"], mean),
        "s": d["reverse_kl"] + d["mean"],
        "t": -d["reverse_kl"],
        "b": -d["kl"] - _times(d["soft"], kept),
        "c": at_label,
    }

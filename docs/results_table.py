"""Writes the README's table of results from one result file: `python docs/results_table.py [--write]`."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks import results
from benchmarks.registry import Case
from benchmarks.results import OK, Row

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
FILE: Final = ROOT / "benchmarks" / "results" / "amd-epyc-7003-avx2.json"
BEGIN: Final = "<!-- results:begin -->\n"
END: Final = "<!-- results:end -->"
HEAD: Final = (
    "operator, shape", "time", "beside plain PyTorch", "beside a peer", "extra memory", "error against float64"
)  # fmt: skip


class Line(NamedTuple):
    """A row of the table: a case, what its plain provider does, and the peer that stands beside ours."""

    text: str
    case: str
    plain: str
    peer: str


LINES: Final = (
    Line(
        "`linear.sqnorms`, 16 x 512 x 1024 x 1024",
        "per_sample.linear.sqnorms/L1/float32",
        "forward+backward",
        "opacus ghost",
    ),
    Line(
        "`linear.sqnorms`, 256 x 1 x 1024 x 1024",
        "per_sample.linear.sqnorms/L4/float32",
        "forward+backward",
        "opacus ghost",
    ),
    Line(
        "clipped step of GPT-2, 4 layers, d 256",
        "per_sample.model.clip/gpt2/float32",
        "a plain step",
        "opacus ghost",
    ),
    Line(
        "`Projection`, 32 x 1M to 512, 1 thread",
        "influence.Projection/1M-to-512/float32",
        "",
        "trak BasicProjector, normal",
    ),
    Line(
        "`topk`, 100 of 100 x 200k x 1024, 1 thread",
        "influence.topk/100x200k/float32",
        "matmul and topk",
        "faiss flat",
    ),
    Line(
        "`project_conflict_`, 448 LoRA tensors, 40 M",
        "surgery.project_conflict/lora-llama2-7b/float32",
        "`torch.dot` and `_foreach_add_`",
        "torchjd PCGrad, Gramian option",
    ),
    Line("`linear_nll`, 1024 x 768 x 32000", "token_loss.linear_nll/V32000/float32", "eager", "torch.compile"),
    Line("`linear_nll`, 1024 x 640 x 262144", "token_loss.linear_nll/V262144/float32", "eager", "torch.compile"),
)  # fmt: skip


def table(rows: list[Row]) -> str:
    """The table in Markdown; cases that the file does not have are left out."""
    found = {(row.case, row.provider): row for row in rows if row.status == OK}
    lines = (_cells(line, found) for line in LINES if (line.case, "unlearn_kernels") in found)
    return "".join(f"| {' | '.join(row)} |\n" for row in (HEAD, ["---"] * len(HEAD), *lines))


def _cells(line: Line, found: dict[tuple[str, str], Row]) -> Iterator[str]:
    ours, peer = found[line.case, "unlearn_kernels"], found.get((line.case, line.peer))
    yield line.text
    yield _time(ours.seconds)
    yield f"{ours.vs_plain:.2g} of {line.plain}" if line.plain and ours.vs_plain else "–"
    yield f"{ours.vs_peers[line.peer]:.2g} of {line.peer}" if line.peer in ours.vs_peers else "–"
    yield _memory(ours) + (f", {line.peer} {_memory(peer)}" if peer else "")
    # A peer with random numbers of its own is judged by how it keeps norms: another quantity than ours.
    same = peer and peer.error and peer.error <= Case.peer_bound
    yield f"{ours.error:.1e}" + (f", {line.peer} {peer.error:.1e}" if peer and same else "")


def _time(seconds: float | None) -> str:
    assert seconds is not None
    return f"{seconds:.2g} s" if seconds >= 0.1 else f"{1e3 * seconds:.2g} ms"


def _memory(row: Row) -> str:
    return f"{(row.peak_bytes or 0) / 1e6:.1f} MB"


def written() -> str:
    """What stands between the README's marks."""
    run, rows = results.load(FILE)
    intro = (
        f"Medians of one run on a shared {run['machine'].split(' (')[0]}, 2 cores, {run['isa']} "
        f"(`{FILE.relative_to(ROOT)}`,\ncommit {run['commit'][:7]}, {run['date'][:10]}). Below 1 is faster.\n\n"
    )
    return intro + table(rows) + "\n"


def current() -> str:
    """What stands there now."""
    return README.read_text().split(BEGIN)[1].split(END)[0]


def write() -> None:
    """Replace the README's table."""
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + written() + END + rest.split(END)[1])


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print(written(), end="")

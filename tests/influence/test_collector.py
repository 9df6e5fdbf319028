"""Rows of a collector against per-sample gradients by `torch.func`, and runs that were ended halfway."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tests.per_sample.models import Pictures, Text, text
from unlearn_kernels.influence import (
    GradientStore,
    InfluenceCollector,
    Projection,
    StoreError,
    class_losses,
    layer_projections,
)
from unlearn_kernels.per_sample import TwoSided
from unlearn_kernels.testing import randn, relative_error

EXACT = 1e-9
STORED = 3e-7  # rows are float32
KINDS = {"rademacher": {}, "gaussian": {}, "sjlt": {"terms": 2}, "srht": {}}


def squares(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().flatten(1).sum(1) / 2


def exact_rows(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Gradients (B, *shape) of `squares`, float64, by `torch.func`."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(weights: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, weights, (sample[None],)).square().sum() / 2

    return vmap(grad(loss), in_dims=(None, 0))(weights, x)


def flattened(grads: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten(1) for g in grads.values()], 1)


def language() -> tuple[nn.Module, Tensor]:
    return Text(tied=True).double(), text(7)


def pictures() -> tuple[nn.Module, Tensor]:
    return Pictures().double(), randn(7, 3, 9, 8, dtype=torch.float64)


def small(seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return model, randn(50, 5, dtype=torch.float64)


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def collector(path: Path, model: nn.Module, projection: object, **options: object) -> InfluenceCollector:
    store = InfluenceCollector.store(path, model, projection, **options)
    return InfluenceCollector(model, projection, store, loss=squares)


@pytest.mark.parametrize("make", [language, pictures])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_projection(tmp_path: Path, make: object, kind: str) -> None:
    torch.manual_seed(0)
    model, x = make()
    whole = flattened(exact_rows(model, x))
    projection = Projection(whole.shape[1], 40, kind, 3, **KINDS[kind])
    one = collector(tmp_path / "s", model, projection)
    assert relative_error(one.rows(x), projection(whole)) < EXACT
    assert one.collect(x, batch_size=3) == 7
    stored = torch.cat([rows for _, rows in one.into.blocks()])
    assert relative_error(stored, projection(whole)) < STORED
    assert torch.equal(one.into.ids(), torch.arange(7))
    assert relative_error(one.into.sqnorms(), projection(whole).square().sum(1)) < STORED
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("make", [language, pictures])
@pytest.mark.parametrize("kind", ["tensorsketch", "two_sided"])
def test_rows_of_a_projection_for_each_parameter(tmp_path: Path, make: object, kind: str) -> None:
    torch.manual_seed(0)
    model, x = make()
    exact = exact_rows(model, x)
    projections = layer_projections(model, 16, kind, seed=5)
    assert list(projections) == list(exact)
    assert len({p.seed for p in projections.values()}) == len(projections)
    expected = torch.cat([projections[name](g.flatten(1)) for name, g in exact.items()], 1)
    one = collector(tmp_path / "s", model, projections)
    assert relative_error(one.rows(x), expected) < EXACT


def test_matrices_of_ones_own_no_projection_and_parts_that_nothing_reaches(tmp_path: Path) -> None:
    model, x = small()
    model.extra = nn.Linear(2, 2).double()
    model.forward = lambda x: nn.Sequential.forward(model[:3], x)
    left, right = randn(2, 6, dtype=torch.float64), randn(3, 5, dtype=torch.float64, seed=1)
    chosen = {"0.weight": TwoSided(left, right), "extra.weight": Projection(4, 8)}
    one = collector(tmp_path / "a", model, chosen)
    rows = one.rows(x)
    exact = exact_rows(model, x)
    assert relative_error(rows[:, :6], (left @ exact["0.weight"] @ right.T).flatten(1)) < EXACT
    assert rows.shape == (50, 14)
    assert not rows[:, 6:].any()
    plain = collector(tmp_path / "b", model, None)
    assert relative_error(plain.rows(x), flattened(exact)) < EXACT


def test_projection_inner_products_are_those_of_gradients(tmp_path: Path) -> None:
    """A mean over seeds: layer projections are unbiased, each with signs of its own."""
    model, x = small()
    whole = flattened(exact_rows(model, x[:4]))
    exact = whole @ whole.T
    found = []
    for seed in range(0, 4000, 10):
        parts = exact_rows(model, x[:4])
        p = layer_projections(model, 16, seed=seed)
        y = torch.cat([p[name](g.flatten(1)) for name, g in parts.items()], 1)
        found.append(y @ y.T)
    off = (torch.stack(found).mean(0) - exact).norm() / exact.norm()
    assert off < 0.05


def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    model, x = small()
    projection = Projection(size(model), 16)
    whole = collector(tmp_path / "whole", model, projection)
    whole.collect(x, batch_size=8)
    seen: list[tuple[int, int]] = []

    class Breaks:
        def __len__(self) -> int:
            return len(x)

        def __getitem__(self, i: int) -> Tensor:
            if i == 30 and len(seen) < 5:
                raise OSError("the disk is gone")
            return x[i]

    one = collector(tmp_path / "s", model, projection)
    with pytest.raises(OSError, match="the disk"):
        one.collect(Breaks(), batch_size=8, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 50), (8, 50), (16, 50), (24, 50)]
    one.into.close()
    again = collector(tmp_path / "s", model, projection)
    assert len(again.into) == 24
    seen.clear()
    assert again.collect(x, batch_size=8, progress=lambda done, total: seen.append((done, total))) == 26
    assert seen[0] == (24, 50)
    assert seen[-1] == (50, 50)
    assert torch.equal(again.into.ids(), torch.arange(50))
    rows, expected = (torch.cat([r for _, r in c.into.blocks()]) for c in (again, whole))
    assert relative_error(rows, expected) < STORED
    assert again.collect(x, batch_size=8) == 0


KILLED = """
    import sys, time, torch
    from torch import nn
    from unlearn_kernels.influence import InfluenceCollector, Projection

    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.arange(400.0).view(100, 4) / 400

    class Slow:
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            time.sleep(0.002)
            return x[i]

    p = Projection(15, 8)
    store = InfluenceCollector.store(sys.argv[1], model, p)
    collector = InfluenceCollector(model, p, store, loss=lambda m, b: m(b).square().sum(1))
    collector.collect(Slow(), batch_size=3, flush_every=6, progress=lambda done, _: print(done, flush=True))
"""


def test_a_killed_process_repeats_and_loses_nothing(tmp_path: Path) -> None:
    """Killed without warning, again and again, until one run comes to its end."""
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path / "s")]
    kills, more = 0, 20
    for _ in range(20):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert process.stdout is not None
        start = int(process.stdout.readline())
        for line in process.stdout:
            if int(line) - start > more and int(line) < 100:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        if process.wait() == 0:
            break
        more += 25
    assert process.returncode == 0
    assert kills >= 2
    store = GradientStore.open(tmp_path / "s")
    store.verify()
    assert torch.equal(store.ids().sort().values, torch.arange(100))
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.arange(400.0).view(100, 4) / 400
    out = 2 * model(x).detach()
    expected = Projection(15, 8)(torch.cat([(out[:, :, None] * x[:, None]).flatten(1), out], 1))
    rows = torch.cat([r for _, r in store.blocks()])[store.ids().argsort()]
    assert relative_error(rows, expected) < 1e-5


def test_items_metadata_batches_and_deleted_rows(tmp_path: Path) -> None:
    model, x = small()
    data = [(x[i], i % 3) for i in range(50)]
    store = InfluenceCollector.store(tmp_path / "s", model, None, "bfloat16")
    one = InfluenceCollector(model, None, store, loss=class_losses)
    calls: list[torch.Size] = []

    def prepare(batch: list[Tensor]) -> list[Tensor]:
        calls.append(batch[0].shape)
        return batch

    options = {"metadata": lambda i: {"class": i % 3}, "prepare": prepare, "batch_size": 4}
    assert one.collect(data, items=[7, 3, 49, 20, 21], **options) == 5
    assert store.ids().tolist() == [7, 3, 49, 20, 21]
    assert store.row_metadata() == [{"class": i % 3} for i in (7, 3, 49, 20, 21)]
    assert calls == [(4, 5), (1, 5)]
    store.delete([20])
    assert one.collect(data, items=[7, 3, 49, 21], batch_size=4) == 0
    assert one.collect(data, items=[20], batch_size=4) == 1
    assert store.ids().tolist() == [7, 3, 49, 21, 20]
    assert one.collect([], batch_size=4) == 0


def test_refusals(tmp_path: Path) -> None:
    model, x = small()
    projection = Projection(size(model), 16)
    one = collector(tmp_path / "s", model, projection)
    parts = layer_projections(model, 16)
    ordered = InfluenceCollector.store(tmp_path / "parts", model, parts)
    raw = InfluenceCollector.store(tmp_path / "raw", model, None)
    for call, message in (
        (lambda: one.collect(x, batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: one.collect(x, flush_every=0), "flush_every must be at least 1, got 0"),
        (lambda: one.collect(x, items=[1, 1]), "items must be different numbers, got 1 more than once"),
        (lambda: one.collect(x, items=[3, 50]), r"items must be in \[0, 50\), got 50"),
        (lambda: one.collect(x, collate=lambda b: torch.stack(b[:-1])), "collate must keep the 32 samples"),
        (
            lambda: InfluenceCollector(model, Projection(size(model), 8), one.into, loss=squares),
            "rows of 8 numbers, got 16",
        ),
        (
            lambda: InfluenceCollector(model, Projection(size(model), 16, seed=1), one.into, loss=squares),
            "store must hold rows of projection .*seed=1",
        ),
        (
            lambda: InfluenceCollector(
                model, projection, one.into, loss=lambda m, b: m(b).detach().sum(1)
            ).rows(x),
            "loss must depend on the model's parameters",
        ),
        (lambda: InfluenceCollector(model, {}, one.into, loss=squares), "projection must not be empty"),
        (
            lambda: InfluenceCollector(model, dict(reversed(parts.items())), ordered, loss=squares),
            "store must hold rows of projection",
        ),
        (
            lambda: InfluenceCollector(model, Projection(size(model), size(model)), raw, loss=squares),
            "store must hold rows of projection .*, got None",
        ),
        (lambda: layer_projections(model, 12), "k must be a power of two, got 12"),
        (lambda: layer_projections(model, 8, "two_sided"), "k must be a power of four, got 8"),
        (lambda: layer_projections(nn.LayerNorm(3), 8, vectors=False), "require grad"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for loss in (lambda m, b: m(b).mean(), lambda m, b: squares(m, b)[:2]):
        wrong = InfluenceCollector(model, projection, one.into, loss=loss)
        with pytest.raises(ValueError, match="loss must return"):
            wrong.rows(x)
    with pytest.raises(ValueError, match="batch must have labels"):
        class_losses(model, {"x": x})
    one.into.close()
    reader = GradientStore.open(tmp_path / "s")
    with pytest.raises(StoreError, match="not open for writing"):
        InfluenceCollector(model, projection, reader, loss=squares).collect(x)


def test_memory_is_not_that_of_all_gradients(tmp_path: Path) -> None:
    """64 samples of a layer with a million weights: 256 MB of gradients, of which 16 are there at once."""
    script = """
        import tempfile, torch
        from torch import nn
        from unlearn_kernels.influence import InfluenceCollector, Projection, layer_projections

        def peak():
            return 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])

        model, x = nn.Linear(1024, 1024), torch.randn(64, 1024)
        for p in (Projection(1024 * 1025, 32, "sjlt"), layer_projections(model, 64)):
            store = InfluenceCollector.store(tempfile.mkdtemp(), model, p)
            c = InfluenceCollector(model, p, store, loss=lambda m, b: m(b).square().sum(1))
            c.rows(x[:2])
            open("/proc/self/clear_refs", "w").write("5")
            before = peak()
            c.rows(x)
            print(peak() - before)
    """
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux's memory accounting")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    whole, layers = map(int, done.stdout.split())
    assert whole < 80 << 20
    assert layers < 8 << 20

"""Tiles that were measured on a device go before computed ones; a device without a file changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton.language as tl

from benchmarks import tune
from unlearn_kernels.triton_kernels import configs
from unlearn_kernels.triton_kernels.common import tile_for

DEVICE = "NVIDIA Imaginary 9000 (80GB)"


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device that does not exist, whose files lie in a folder of their own."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path / "configs")
    monkeypatch.setattr(configs, "device_name", lambda: DEVICE)
    configs.table_of.cache_clear()
    yield DEVICE
    configs.table_of.cache_clear()


def test_a_device_without_a_file_computes(device: str) -> None:
    before = tile_for(1024, 1024, 1024, tl.bfloat16)
    assert before == (128, 128, 64, 8, 3)
    assert configs.measured("bf16", 1) is None


def test_measured_tiles_go_before(device: str) -> None:
    tune.write(device, {"bf16 x 1": (128, 256, 64, 8, 4), "fp32 x 2": (32, 64, 32, 4, 2)})
    assert configs.file_of(device).name == "nvidia-imaginary-9000-80gb.json"
    assert tile_for(1024, 1024, 1024, tl.bfloat16) == (128, 256, 64, 8, 4)
    assert tile_for(100, 20, 20, tl.bfloat16) == (128, 32, 32, 4, 4)
    assert tile_for(1024, 1024, 1024, tl.float32, accumulators=2) == (32, 64, 32, 4, 2)
    assert tile_for(1024, 1024, 1024, tl.float16) == (128, 128, 64, 8, 3)


@pytest.mark.parametrize(
    "tile", [[128, 128, 64, 8], [100, 128, 64, 8, 3], [128, 128, 8, 8, 3], [16, 16, 16, 3, 1]]
)
def test_a_wrong_file_is_told(device: str, tile: list[int]) -> None:
    path = configs.file_of(device)
    path.parent.mkdir()
    path.write_text(json.dumps({"tiles": {"bf16 x 1": tile}}))
    with pytest.raises(ValueError, match=r"nvidia-imaginary-9000-80gb.json: bf16 x 1 must have .* got \("):
        tile_for(64, 64, 64, tl.bfloat16)


def test_shipped_files_can_be_read() -> None:
    for path in configs.FOLDER.glob("*.json"):
        assert configs.file_of(json.loads(path.read_text())["device"]) == path
        assert configs.table_of(json.loads(path.read_text())["device"])


@pytest.mark.parametrize("dot", tune.DTYPES)
def test_the_fastest_candidate_wins(dot: str) -> None:
    tried: list[configs.Limits | None] = []
    wanted = sorted(tune.candidates(dot))[3]

    def seconds() -> float:
        tried.append(configs.measured(dot, 2))
        if len(tried) == 1:
            raise RuntimeError("does not fit")
        return 1.0 if tried[-1] == wanted else 2.0

    assert tune.best(dot, 2, seconds) == (wanted, 1.0)
    assert tried == list(tune.candidates(dot))
    assert configs.measured(dot, 2) is None

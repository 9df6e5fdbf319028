"""The benchmark of whole passes, on models of a second."""

import pytest
import torch

from benchmarks import passes


def test_all_ways_run(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    try:
        passes.main(["--small", "--rounds", "1"])
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert all(float(line.split()[-2]) > 0 for line in lines)

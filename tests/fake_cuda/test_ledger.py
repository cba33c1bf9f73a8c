"""The ledger of a run whose images are on the GPU."""

from pathlib import Path

import pytest

from fake_cuda.runner import run

pytestmark = pytest.mark.fake_cuda


def test_the_ledger_does_not_wait_for_the_device(tmp_path):
    """It needs the indices on the host, where the sampler made them."""
    for name in ("without", "with"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    ended = run(Path(__file__).parent / "ledger_program.py", tmp_path).succeeded()
    without, with_ledger = map(int, ended.stdout.split())
    assert with_ledger == without
    (lines,) = (tmp_path / "with/ledger").glob("*/rank-00000.jsonl")
    assert len(lines.read_text().splitlines()) == 6

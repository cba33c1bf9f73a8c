"""``make gpu-report`` on the fake GPU: its programs run, and its page and status are right. No figure is checked."""

import sys
from pathlib import Path

import pytest
from conftest import REPO, run_command

from fake_cuda.runner import environment

pytestmark = [pytest.mark.fake_cuda, pytest.mark.slow]

HERE = Path(__file__).parent
PROGRAM = """
import gpu_report
from gpu.questions import Question

names = ("crash", "fp32", "one_run")
gpu_report.main([Question(name, name, f"fake_cuda.report_questions:{name}", 0, 250) for name in names])
"""


def test_the_report_on_the_fake(tmp_path):
    """A crash and a promise that cannot be kept are found; the other questions are answered."""
    fake = environment()
    path = f"{HERE / 'every_process'}:{fake['PYTHONPATH']}:{REPO / 'benchmarks'}"
    settings = {**fake, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0", "FAKE_CUDA_DEVICES": "1"}
    words = ("--out", tmp_path / "GPU.md", "--steps-scale", "0.01", "--require", "plain=1e9", "--require", "replay=0")
    ended = run_command(sys.executable, "-c", PROGRAM, *words, env=settings, timeout=800)
    page = (tmp_path / "GPU.md").read_text()
    assert ended.status == 1, f"{ended}\n{page}"
    assert "| GPU | Fake GPU |" in page
    assert "| **FAIL** | the question is answered: crash | failed: exit status -6 |" in page
    assert (
        "| **FAIL** | fp32, batch 16, model.channels_last=false: at least 1e+09 times the speed of the plain recipe |"
        in page
    )
    assert (
        "| ok | fp32, batch 16, model.channels_last=false: at least 0 of the speed of the bare graph replay |" in page
    )
    assert "| ok | fp32, train.cuda_graph=auto: no host sync between log points | 0 in " in page
    assert page.count("**FAIL**") == 2, page

"""W&B's real ``wandb sweep`` and ``wandb agent``, with the shipped sweep, and a fake server on loopback."""

import json
import re
import sys

import pytest
import yaml
from conftest import REPO, run_command
from wandb_server import WandbServer

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

SWEEP = REPO / "configs/sweeps/lenet.yaml"
TRIALS = {"trial001": {"optim.lr": 0.1, "optim.momentum": 0.8}, "trial002": {"optim.lr": 0.1, "optim.momentum": 0.9}}
COMMANDS = """
from wandb.cli.cli import cli
from wandb.wandb_agent import Agent
Agent.POLL_INTERVAL = 0.2  # seconds; 5 by default
cli("sweep --project lenet sweep.yaml".split(), standalone_mode=False)
cli("agent --count 2 tester/lenet/sweep1".split(), standalone_mode=False)
"""


@pytest.fixture
def server():
    server = WandbServer()
    yield server
    server.close()


def test_the_guide_shows_the_shipped_sweep():
    (shown,) = re.findall(r"```yaml\n(program: .*?)```", (REPO / "docs/guide.md").read_text(), re.S)
    assert yaml.safe_load(shown) == yaml.safe_load(SWEEP.read_text())


def test_an_agent_runs_the_trials_of_the_shipped_sweep_on_two_ranks(tmp_path, server):
    sweep = yaml.safe_load(SWEEP.read_text())
    settings = ["data.name=digits", "device=cpu", "train.max_steps=2", "train.log_every=1", f"run.dir={tmp_path}"]
    assert sweep["command"][0] == "torchrun"
    sweep["command"][:1] = [sys.executable, "-m", "distlenet.launch"]  # starts faster
    sweep["command"][-1:] = [*settings, "wandb.finish_timeout_s=600", sweep["command"][-1]]
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    environ = {**server.environ, "WANDB_AGENT_MAX_INITIAL_FAILURES": "1"}
    server.trials = TRIALS
    ended = run_command(sys.executable, "-c", COMMANDS, env=environ, cwd=tmp_path, timeout=800).succeeded()
    assert "wandb agent tester/lenet/sweep1" in ended.stderr  # the command that the first one prints
    assert yaml.safe_load(server.sweep)["parameters"].keys() == sweep["parameters"].keys()
    assert server.sweep_of == dict.fromkeys(TRIALS, "sweep1")
    for run, parameters in TRIALS.items():
        config = {key: entry["value"] for key, entry in server.configs[run].items() if isinstance(entry, dict)}
        assert {f"optim.{key}": config["optim"][key] for key in ("lr", "momentum")} == parameters
        assert config["environment"]["world_size"] == 2
        records = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        rows = [row["val/loss"] for row in server.history(run) if "val/loss" in row]
        assert rows == [record["loss"] for record in records if record["split"] == "val"] != []
        assert server.endings[run]["exitcode"] == 0

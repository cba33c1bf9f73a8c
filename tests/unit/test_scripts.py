"""The launch and batch scripts, as far as they answer without training."""

import shutil
import subprocess

import pytest
from conftest import REPO, run_command

pytestmark = pytest.mark.unit

SCRIPTS = sorted([*REPO.glob("launch/*.sh"), *REPO.glob("slurm/*.sbatch"), *REPO.glob("slurm/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it_and_shellcheck_finds_nothing(script):
    run_command("bash", "-n", script).succeeded()
    if shutil.which("shellcheck") is not None:  # from the extra ``dev``
        found = subprocess.run(["shellcheck", "-x", script], cwd=REPO, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["local.sh", "node.sh"])
def test_help(name):
    ended = run_command(REPO / "launch" / name, "--help").succeeded()
    assert ended.stdout.startswith(f"launch/{name} ")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["local.sh", "-n"], "-n: a value is missing"),
        (["local.sh", "-n", "two"], "-n two: expected a whole number"),
        (["local.sh", "--bogus"], "unknown option --bogus"),
        (["node.sh", "--head", "localhost"], "--nodes is missing: how many machines train"),
        (["node.sh", "--nodes", "2"], "--head is missing"),
        (["node.sh", "--nodes", "0", "--head", "localhost"], "--nodes 0: expected N or MIN:MAX"),
        (["node.sh", "--nodes", "4:2", "--head", "localhost"], "--nodes 4:2: MIN is above MAX"),
        (["node.sh", "--nodes", "2", "--head", "no.such.host.invalid"], "--head no.such.host.invalid: no such host"),
        (["node.sh", "--nodes", "2", "--head", "localhost", "--interface", "no0"], "--interface no0: this machine has"),
    ],
)
def test_a_mistake_is_one_line(words, part):
    ended = run_command(REPO / "launch" / words[0], *words[1:])
    assert ended.status == 2, str(ended)
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{words[0]}: {part}"), line
    assert line.endswith("; --help lists all options")

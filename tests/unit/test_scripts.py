"""The launch and batch scripts: syntax, shellcheck, help and usage errors."""

import shutil
import subprocess

import pytest
from conftest import REPO, run_command

pytestmark = pytest.mark.unit

SCRIPTS = sorted([*REPO.glob("launch/*.sh"), *REPO.glob("slurm/*.sbatch"), *REPO.glob("slurm/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_and_shellcheck_accept_the_script(script):
    run_command("bash", "-n", script).succeeded()
    if shutil.which("shellcheck") is not None:  # from the extra ``dev``
        result = subprocess.run(["shellcheck", "-x", script], cwd=REPO, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", ["local.sh", "node.sh"])
def test_help(name):
    result = run_command(REPO / "launch" / name, "--help").succeeded()
    assert result.stdout.startswith(f"launch/{name} ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["local.sh", "-n"], "-n: a value is missing"),
        (["local.sh", "-n", "two"], "-n two: expected an integer"),
        (["local.sh", "--bogus"], "unknown option --bogus"),
        (["node.sh", "--head", "localhost"], "--nodes is missing: give the number of machines"),
        (["node.sh", "--nodes", "2"], "--head is missing"),
        (["node.sh", "--nodes", "0", "--head", "localhost"], "--nodes 0: expected N or MIN:MAX"),
        (["node.sh", "--nodes", "4:2", "--head", "localhost"], "--nodes 4:2: MIN is larger than MAX"),
        (
            ["node.sh", "--nodes", "2", "--head", "no.such.host.invalid"],
            "--head no.such.host.invalid: the name",
        ),
        (["node.sh", "--nodes", "2", "--head", "localhost", "--interface", "no0"], "--interface no0: this machine has"),
    ],
)
def test_a_usage_error_is_one_line(arguments, message):
    script, *options = arguments
    result = run_command(REPO / "launch" / script, *options)
    assert result.status == 2, str(result)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{script}: {message}"), line
    assert line.endswith("; --help lists all options")

"""The launch and batch scripts: syntax, help and usage errors; make lint runs shellcheck on them."""

import re
import sys

import pytest
from conftest import REPO, run_command

pytestmark = pytest.mark.unit

SCRIPTS = sorted([*REPO.glob("launch/*.sh"), *REPO.glob("slurm/*.sbatch"), *REPO.glob("slurm/*.sh")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(script):
    run_command("bash", "-n", script).succeeded()


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


def test_both_images_install_the_same_packages():
    """The commands of %post in the Apptainer definition are those of the last stage of the Containerfile."""
    stage = (REPO / "launch/Containerfile").read_text().rpartition("\nFROM ")[2]
    commands = [line.removeprefix("RUN ") for line in stage.splitlines() if line.startswith("RUN pip ")]
    definition = (REPO / "launch/distlenet.def").read_text()
    sections = dict(re.findall(r"^%(\w+)\n(.*?)\n(?=%|\Z)", definition, re.MULTILINE | re.DOTALL))
    assert len(commands) == 2
    post = sections["post"].replace("{{ TORCH_INDEX }}", "${TORCH_INDEX}").replace("/opt/distlenet/", "/wheel/")
    assert [line.strip() for line in post.splitlines() if line.strip()] == commands
    assert re.search(r"^ARG (TORCH_INDEX=.*)", stage, re.MULTILINE)[1] == sections["arguments"].strip()
    base = re.search(r"^ARG BASE=docker.io/library/(.*)", (REPO / "launch/Containerfile").read_text(), re.MULTILINE)[1]
    assert f"\nFrom: {base}\n" in definition


@pytest.fixture
def srun(tmp_path):
    """Run a batch script with an ``srun`` that prints its arguments, one per line; return them."""
    for name, body in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo n1"), ("python3", "exit 9")):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    job = {"SLURM_SUBMIT_DIR": str(REPO), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}

    def run(script, **variables):
        environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", **job, **variables}
        return run_command("bash", REPO / "slurm" / script, "seed=1", env=environ).succeeded().stdout.splitlines()

    return run


PYXIS = ["--container-image=team/net:2", f"--container-mounts={REPO}:{REPO}", f"--container-workdir={REPO}"]
APPTAINER = ["apptainer", "exec", "--bind", f"{REPO}:{REPO},/data:/data", "--pwd", str(REPO), "--nv", "net.sif"]


@pytest.mark.parametrize("script", ["train.sbatch", "preflight.sbatch", "srun_direct.sbatch"])
def test_a_container_is_between_srun_and_the_command(srun, script):
    """The interpreter of the host, which cannot import anything, is not used."""
    command = "python3" if script == "srun_direct.sbatch" else "bash"
    for container, variables in (
        (PYXIS, {"CONTAINER": "team/net:2"}),
        (APPTAINER, {"CONTAINER": "net.sif", "CONTAINER_MOUNTS": "/data:/data", "SLURM_GPUS_ON_NODE": "8"}),
    ):
        words = srun(script, **variables)
        assert words[0].startswith("--kill-on-bad-exit=")
        assert words[1 : len(container) + 2] == [*container, command]
        assert words[-1] == "seed=1"


def test_without_a_container_the_command_follows_srun(srun):
    assert srun("srun_direct.sbatch", PYTHON=sys.executable)[1:3] == [sys.executable, "-m"]

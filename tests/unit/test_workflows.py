"""The workflows of GitHub: they run the checks of .ci/run, and a release needs them."""

import re

import pytest
import yaml
from conftest import REPO

pytestmark = pytest.mark.unit

CHECK, RELEASE = (yaml.safe_load((REPO / f".github/workflows/{name}.yml").read_text()) for name in ("check", "release"))


def commands_of_ci() -> set[str]:
    """Return the commands of .ci/run that call make, without training, which the header of check.yml leaves out."""
    lines = [line for line in (REPO / ".ci/run").read_text().splitlines() if not line.startswith("#")]
    found = {match[0] for line in lines if (match := re.match(r'(\w+=\w+ )?make [\w-]+( ARGS="[^"]*")?', line))}
    assert sum(" make " in f" {line}" for line in lines) == len(found) + 1  # "make train" is there twice
    return {command for command in found if not command.startswith("make train")}


def test_the_workflow_runs_the_checks_of_ci():
    matrix = {name: job["strategy"]["matrix"] for name, job in CHECK["jobs"].items()}
    run = {part.removeprefix('sudo env "PATH=$PATH" ') for part in matrix["suite"]["part"]}
    run |= {f"make {entry['target']}" for entry in matrix["versions"]["include"]}
    assert len(commands_of_ci()) > 4
    assert commands_of_ci() - run == set()


def test_a_release_is_published_after_all_checks():
    jobs = RELEASE["jobs"]
    assert (jobs["publish"]["needs"], jobs["build"]["needs"]) == ("build", "check")
    assert jobs["check"] == {"uses": "./.github/workflows/check.yml"}  # without "if" or "continue-on-error"
    assert "workflow_call" in CHECK[True]  # YAML reads "on" as true

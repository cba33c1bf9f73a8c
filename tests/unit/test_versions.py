"""The versions of docs/versions.md, pyproject.toml, the workflow, this environment, images and the citation agree."""

import os
import platform
import re
import tomllib
from importlib.metadata import PackageNotFoundError, version

import pytest
import yaml
from conftest import REPO
from packaging.requirements import Requirement
from packaging.version import Version

from distlenet import __version__

pytestmark = pytest.mark.unit

PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
LOWEST = os.environ.get("DISTLENET_VERSIONS") == "lowest"
"""In the environment of ``make test-lowest``."""


def requirements(extra: str = "") -> list[Requirement]:
    """Return what the package needs, or an extra with the extras that it contains."""
    found = []
    for text in PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            found += [other for part in sorted(requirement.extras) for other in requirements(part)]
        else:
            found.append(requirement)
    return found


def lowest(requirement: Requirement) -> Version:
    (bound,) = [specifier for specifier in requirement.specifier if specifier.operator == ">="]
    return Version(bound.version)


def table(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its head."""
    section = (REPO / "docs/versions.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_the_table_has_the_lowest_versions_of_pyproject():
    extras = sorted(PROJECT["optional-dependencies"].keys() - {"docs", "test", "dev", "bench"})  # those of users
    needed = requirements() + [requirement for extra in extras for requirement in requirements(extra)]
    declared = {requirement.name: str(lowest(requirement)) for requirement in needed}
    assert {name.strip("`"): least for name, least, *_ in table("Supported")} == {
        "Python": PROJECT["requires-python"].removeprefix(">="),
        **declared,
    }


def test_the_versions_of_python_are_those_of_the_workflow():
    workflow = yaml.safe_load((REPO / ".github/workflows/check.yml").read_text())
    entries = workflow["jobs"]["versions"]["strategy"]["matrix"]["include"]
    newest = {entry["python"] for entry in entries if entry["target"] == "check"}
    classifiers = {re.sub(r".*:: ", "", text) for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)}
    assert newest == classifiers
    assert "3." + platform.python_version_tuple()[1] in classifiers
    (least,) = [entry["python"] for entry in entries if entry["target"] == "test-lowest"]
    assert least == PROJECT["requires-python"].removeprefix(">=")


def test_the_tags_of_images_are_the_version():
    pages = [REPO / "README.md", *(path for part in ("docs", "launch") for path in (REPO / part).rglob("*.*"))]
    texts = {
        path.relative_to(REPO): path.read_text() for path in [*pages, REPO / "launch/Containerfile"] if path.is_file()
    }
    tags = {
        (path, tag) for path, text in texts.items() for tag in re.findall(r"\bdistlenet(?:-serve)?:(\d[\w.]*)", text)
    }
    (kustomization,) = [text for path, text in texts.items() if path.name == "kustomization.yaml"]
    tags.add(("kustomization", yaml.safe_load(kustomization)["images"][0]["newTag"]))
    assert len(tags) > 5
    assert {entry for entry in tags if entry[1] != __version__} == set()


def test_the_citation_is_of_this_version():
    """It has the date of a release only if the changelog has that release."""
    citation = yaml.safe_load((REPO / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    released = re.search(rf"^## {re.escape(__version__)} - (\S+)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert str(citation.get("date-released", "")) == (released[1] if released else "")


@pytest.mark.parametrize("requirement", requirements() + requirements("test"), ids=lambda requirement: requirement.name)
def test_this_environment_has_supported_versions(requirement):
    """In that of ``make test-lowest``, exactly the lowest ones: nothing is missing, so no test is skipped for it."""
    try:
        installed = Version(Version(version(requirement.name)).public)  # without "+cu128"
    except PackageNotFoundError:
        installed = None  # an optional package
    assert installed == lowest(requirement) if LOWEST else installed is None or installed >= lowest(requirement)

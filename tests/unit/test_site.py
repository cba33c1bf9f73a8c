"""The documentation site, built as by make docs: it needs no other host, and its links lead somewhere."""

import re
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import REPO, run_command
from forked import run_python

pytestmark = [pytest.mark.unit, pytest.mark.slow]


class Html(HTMLParser):
    """The links of a page, what a browser loads for it, and its anchors."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values.get("id", ""), values.get("name", "")}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(values["href"])
        elif "src" in values:
            self.loads.append(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site. A warning, such as a wrong link or a page outside the navigation, fails the build."""
    directory = tmp_path_factory.mktemp("site")
    build = ("build", "--strict", "--config-file", REPO / "docs/site/mkdocs.yml", "--site-dir", directory)
    environment = {"NO_MKDOCS_2_WARNING": "1"}
    run_command(sys.executable, "-m", "mkdocs", *build, env=environment).succeeded()
    return {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pages(site):
    pages = {name: Html(path) for name, path in site.items() if name.endswith(".html") and name != "404.html"}
    assert len(pages) > 25
    return pages


def test_no_page_loads_anything_from_another_host(pages, site):
    external = {name: [url for url in page.loads if "//" in url] for name, page in pages.items()}
    assert {name: urls for name, urls in external.items() if urls} == {}
    styles = [url for name, path in site.items() if name.endswith(".css") for url in CSS_URL.findall(path.read_text())]
    assert [url for url in styles if "//" in url and not url.startswith("data:")] == []
    assert all(any(url.endswith(".css") for url in page.loads) for page in pages.values())


CSS_URL = re.compile(r"""(?:url\(|@import )["']?([^"')]+)""")


def test_each_link_of_the_site_resolves(pages, site):
    broken = []
    for name, page in pages.items():
        for url in [*page.links, *page.loads]:
            if re.match(r"[a-z]+:", url):
                continue
            path, _, anchor = unquote(unescape(url)).partition("#")
            target = (Path("/") / Path(name).parent / path).resolve().relative_to("/").as_posix() if path else name
            target = {".": "index.html"}.get(target, target)
            if target not in site or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append((name, url))
    assert broken == []


def test_the_reference_has_each_public_name(pages):
    import distlenet

    documented = {anchor.rpartition(".")[2] for anchor in pages["reference.html"].anchors}
    assert set(distlenet.__all__) - documented == set()


def test_the_import_edges_are_drawn(site):
    text = site["architecture.html"].read_text()
    edges = re.findall(r"^    \w+ --> \w+$", (REPO / "docs/architecture.md").read_text(), re.MULTILINE)
    assert text.count('class="edge"') == len(edges) > 10


def test_the_migrated_training_runs(tmp_path):
    """The files and the command of the page, for 3 steps on one rank."""
    page = (REPO / "docs/migration.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "circle.py").write_text(blocks[0])
    (tmp_path / "tasks.py").write_text(blocks[-1])
    settings = re.findall(r"\w+\.\w+=\S+", re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[-1])
    assert "train.global_batch_size=64" in settings
    short = ("device=cpu", "train.max_steps=3", "wandb.mode=disabled")
    assert "of 1001 samples" in run_python("-m", "distlenet.train", *settings, *short, cwd=tmp_path).succeeded().stdout

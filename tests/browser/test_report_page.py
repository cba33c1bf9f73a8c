"""The report in a real browser: nothing fails, nothing is fetched, all is to be seen on a phone and on a desk."""

import os
import sys

import pytest
from browser import PROGRAM, Browser
from conftest import run_command

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if PROGRAM is None:
        if os.environ.get("DISTLENET_BROWSER") == "required":  # make test-browser
            pytest.fail("no Chromium")
        pytest.skip("no Chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of one run of two ranks that was started twice, and one of two runs side by side."""
    folder = tmp_path_factory.mktemp("runs")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    words = ("-m", "distlenet.train", "data.name=digits", "train.log_every=5", "optim.lr=0.05", f"run.dir={folder}")
    run_command(*launcher, *words, "run.name=first", "train.epochs=6", "run.report=always").succeeded()
    again = ("run.name=first", "train.epochs=8", "checkpoint.allow_changed=[train.epochs]", "run.report=always")
    ended = run_command(*launcher, *words, *again).succeeded()
    assert f"Report: {folder}/first/report.html" in ended.stdout
    run_command(*launcher, *words, "run.name=second", "train.epochs=4", "seed=1").succeeded()
    both = folder / "both.html"
    run_command(
        sys.executable, "-m", "distlenet.report", folder / "first", folder / "second", "--output", both
    ).succeeded()
    return {"one": folder / "first/report.html", "two": both}


SEEN = """
[...document.querySelectorAll("figure")].map(figure => {
  const box = figure.getBoundingClientRect(), inner = figure.querySelector("svg, img");
  const own = inner.getBoundingClientRect();
  const drawn = inner.tagName == "IMG" ? inner.naturalWidth : inner.querySelectorAll("path").length;
  return {title: figure.textContent.trim().slice(0, 40), left: box.left, right: box.right, width: own.width,
          height: own.height, drawn: drawn};
})
"""


@pytest.mark.parametrize(("page", "charts"), [("one", 9), ("two", 6)])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1400, 900)])
def test_everything_is_to_be_seen(browser, pages, page, charts, width, height):
    browser.open(pages[page].as_uri(), width, height)
    figures = browser.value(SEEN)
    assert len(figures) >= charts
    for number, figure in enumerate(figures):
        assert figure["left"] >= 0, figure
        assert figure["right"] <= width, figure
        assert figure["width"] >= (250 if number < charts else 50), figure
        assert figure["height"] >= (120 if number < charts else 50), figure
        assert figure["drawn"] > 0, figure
    assert browser.value("document.documentElement.scrollWidth") <= width  # nothing to scroll to the side for
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    assert browser.value(smallest) >= 5  # pixels: a matrix's numbers are the smallest
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [pages[page].as_uri()]
    methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in browser.events if event.get("method") in methods] == []


def test_a_name_that_is_a_script_does_not_run(browser, tmp_path):
    folder = tmp_path / "<img src=x onerror=document.title='ran'>"
    words = (
        "data.name=digits",
        "train.epochs=1",
        f"run.dir={tmp_path}",
        f"run.name={folder.name}",
        "run.report=always",
    )
    run_command(
        sys.executable, "-m", "distlenet.train", *words, "wandb.notes='<script>document.title=1</script>'"
    ).succeeded()
    browser.open((folder / "report.html").as_uri(), 390, 844)
    assert browser.value("document.title") == folder.name
    assert browser.value("document.querySelectorAll('script').length") == 0
    assert browser.value("document.querySelector('h1').textContent") == folder.name

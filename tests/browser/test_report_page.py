"""The report in a browser: no errors, no requests, and everything visible on a phone and a desktop screen."""

import pytest
from browser import open_browser
from forked import run_python, run_ranks

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one run that was started twice, and a page of two runs."""
    directory = tmp_path_factory.mktemp("runs")
    train = ("-m", "distlenet.train", "data.name=digits", "train.log_every=5", "optim.lr=0.05", f"run.dir={directory}")
    run_ranks(2, *train, "run.name=first", "train.epochs=6", "run.report=always").succeeded()
    resumed = ("run.name=first", "train.epochs=8", "checkpoint.allow_changed=[train.epochs]", "run.report=always")
    ended = run_ranks(2, *train, *resumed).succeeded()
    assert f"Report: {directory}/first/report.html" in ended.stdout
    run_ranks(2, *train, "run.name=second", "train.epochs=4", "seed=1").succeeded()
    both = directory / "both.html"
    run_python("-m", "distlenet.report", directory / "first", directory / "second", "--output", both).succeeded()
    return {"one": directory / "first/report.html", "two": both}


FIGURES = """
[...document.querySelectorAll("figure")].map(figure => {
  const box = figure.getBoundingClientRect(), inner = figure.querySelector("svg, img");
  const innerBox = inner.getBoundingClientRect();
  const drawn = inner.tagName == "IMG" ? inner.naturalWidth : inner.querySelectorAll("path").length;
  return {title: figure.textContent.trim().slice(0, 40), left: box.left, right: box.right, width: innerBox.width,
          height: innerBox.height, drawn: drawn};
})
"""


@pytest.mark.parametrize(("page", "charts"), [("one", 9), ("two", 6)])
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1400, 900)])
def test_everything_is_visible(browser, pages, page, charts, width, height):
    browser.open(pages[page].as_uri(), width, height)
    figures = browser.evaluate(FIGURES)
    assert len(figures) >= charts
    for number, figure in enumerate(figures):
        assert figure["left"] >= 0, figure
        assert figure["right"] <= width, figure
        assert figure["width"] >= (250 if number < charts else 50), figure
        assert figure["height"] >= (120 if number < charts else 50), figure
        assert figure["drawn"] > 0, figure
    assert browser.evaluate("document.documentElement.scrollWidth") <= width  # no horizontal scrolling
    smallest = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
    assert browser.evaluate(smallest) >= 5  # pixels; the numbers of the confusion matrix are the smallest
    requests = [e["params"]["request"]["url"] for e in browser.events if e.get("method") == "Network.requestWillBeSent"]
    assert [url for url in requests if not url.startswith("data:")] == [pages[page].as_uri()]
    methods = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in browser.events if event.get("method") in methods] == []
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.accessibility_problems() == []


def test_script_in_a_name_does_not_run(browser, tmp_path):
    directory = tmp_path / "<img src=x onerror=document.title='ran'>"
    settings = ("data.name=digits", "train.epochs=1", f"run.dir={tmp_path}", f"run.name={directory.name}")
    notes = "wandb.notes='<script>document.title=1</script>'"
    run_python("-m", "distlenet.train", *settings, "run.report=always", notes).succeeded()
    browser.open((directory / "report.html").as_uri(), 390, 844)
    assert browser.evaluate("document.title") == directory.name
    assert browser.evaluate("document.querySelectorAll('script').length") == 0
    assert browser.evaluate("document.querySelector('h1').textContent") == directory.name

"""The documentation site in a browser: no other host, nothing wider than a phone, and a search that finds."""

import sys
from urllib.parse import urlsplit

import pytest
from browser import open_browser, static_host_of
from conftest import REPO, run_command

pytestmark = pytest.mark.browser

PAGES = (
    "index",
    "start",
    "settings",
    "architecture",
    "kubernetes",
    "containers",
    "migration",
    "troubleshooting",
    "reference",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the built site: its search needs a server."""
    directory = tmp_path_factory.mktemp("site")
    build = ("build", "--strict", "--config-file", REPO / "docs/site/mkdocs.yml", "--site-dir", directory)
    run_command(sys.executable, "-m", "mkdocs", *build, env={"NO_MKDOCS_2_WARNING": "1"}).succeeded()
    with static_host_of(directory) as address:
        yield address


@pytest.mark.parametrize("width", [390, 1400])
def test_pages_fit_the_screen_and_need_no_other_host(browser, site, width):
    for page in PAGES:
        browser.open(f"{site}/{page}.html", width, 844)
        assert browser.evaluate("document.documentElement.scrollWidth") <= width, page
        broken = "[...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
        assert browser.evaluate(broken) == [], page
        assert [event for event in browser.events if event["method"] == "Runtime.exceptionThrown"] == [], page
        sent = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
        hosts = {urlsplit(request["request"]["url"]).netloc for request in sent} - {""}  # "": data: URLs
        assert hosts == {urlsplit(site).netloc}, page


UNCHECKED = ("landmark-unique", "scrollable-region-focusable")
"""Rules about what the theme's script does in each block of code: an unnamed navigation, and no ``tabindex`` on screens
without a mouse. Browsers let the keyboard scroll it nevertheless."""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_pages_are_accessible(browser, site, scheme):
    browser.prefer(scheme)
    browser.open(f"{site}/index.html", 1400, 844)
    browser.evaluate("localStorage.clear()")  # the scheme of the page before
    for page in PAGES:
        browser.open(f"{site}/{page}.html", 1400, 844)
        assert browser.evaluate("document.body.dataset.mdColorScheme") == {"dark": "slate", "light": "default"}[scheme]
        assert browser.accessibility_problems(UNCHECKED) == [], page


SEARCH = """
new Promise(resolve => {
  if (innerWidth < 900) document.querySelector("label[for=__search]").click();
  const query = document.querySelector("[data-md-component=search-query]");
  query.value = "stop requests";
  query.focus();
  query.dispatchEvent(new Event("keyup"));
  const results = document.querySelector(".md-search-result__list");
  const check = () => {
    const titles = [...results.querySelectorAll("article h1")].map(title => title.textContent.trim());
    if (titles.length) resolve(titles);
  };
  new MutationObserver(check).observe(results, {childList: true, subtree: true});
  check();
  setTimeout(() => resolve(["nothing was found in 120 s"]), 120000);
})
"""


@pytest.mark.parametrize("width", [390, 1400])
def test_the_search_finds_the_page_about_stop_requests(browser, site, width):
    browser.open(f"{site}/index.html", width, 844)
    assert browser.evaluate(SEARCH)[0] == "Failures"

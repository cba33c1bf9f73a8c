"""The documentation: its links, settings and commands exist, and the language is plain."""

import ast
import pkgutil
import re
from pathlib import Path

import pytest
from conftest import REPO

from distlenet.config.fields import FIELDS

pytestmark = pytest.mark.unit

PAGES = sorted(
    [
        REPO / "README.md",
        *REPO.glob("CONTRIBUTING.md"),
        *REPO.glob("docs/*.md"),
        *REPO.glob("benchmarks/*.md"),
        *REPO.glob("examples/**/*.md"),
    ]
)
NOT_SETTINGS = {"key", "checkpoint", "file"}
"""The placeholder ``key=value``, the argument ``checkpoint=RUN`` of some commands, and ``file=@IMAGE`` of curl."""

CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SUFFIXES = {"csv", "gz", "html", "json", "jsonl", "md", "onnx", "pt", "pt2", "py", "safetensors", "sbatch", "sh", "svg"}
SUFFIXES |= {"txt", "yaml"}
"""Last parts of names such as ``data.json`` that are files, not settings."""

PLAIN_WORDS = {
    "told": "reported, logged",
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "dear": "expensive",
    "surest": "most confident",
    "alike": "identical, the same",
    "of its own": "separate",
    "goes on": "continues",
    "going on": "continuing, resuming",
    "whole number": "integer",
    "in vain": "fails",
    "if asked": "if requested, with SETTING",
    "is to be done": "no action is needed",
}
"""Expressions that do not occur in this project, and what to write instead."""

EXCEPTIONS: dict[str, set[str]] = {"CONTRIBUTING.md": set(PLAIN_WORDS)}
"""Files that may contain some of them: CONTRIBUTING.md lists them."""

TEXT_SUFFIXES = {".py", ".md", ".sh", ".sbatch", ".yaml", ".html", ".toml"}


def relative(path: Path) -> str:
    return str(path.relative_to(REPO))


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes for the headings of a page."""
    headings = re.findall(r"^#+ +(.+?) *$", CODE_BLOCK.sub("", page.read_text()), re.MULTILINE)
    slugs = (re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)
    return set(slugs)


def links(page: Path) -> list[str]:
    """Return the targets of all links and images that do not lead to another site."""
    targets = re.findall(r"\]\(([^)\s]+)\)", CODE_BLOCK.sub("", page.read_text()))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def code_of(page: Path) -> str:
    """Return what a page sets as code: shell blocks, and spans in backticks."""
    text = page.read_text()
    blocks = [block for block in CODE_BLOCK.findall(text) if not block.startswith("```python")]
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", CODE_BLOCK.sub("", text))])


def unknown_settings(code: str) -> set[str]:
    """Return what ``code`` writes like a setting, ``group.key`` or ``key=value``, and the schema does not contain."""
    groups = "|".join(sorted({key.partition(".")[0] for key in FIELDS if "." in key}))
    dotted = set(re.findall(rf"(?<![\w./])((?:{groups})\.\w+)(?![\w/.(])", code))
    dotted -= {name for name in dotted if name.rpartition(".")[2] in SUFFIXES}
    assigned = set(re.findall(r"(?:^|[\s\"])([a-z]\w*)=(?!True|=)", code, re.MULTILINE))  # not --option=value
    return dotted - FIELDS.keys() | assigned - FIELDS.keys() - NOT_SETTINGS


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_each_link_resolves(page):
    broken = []
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_each_setting_exists(page):
    assert unknown_settings(code_of(page)) == set()


def test_a_setting_that_does_not_exist_is_found():
    code = "`optim.rate` data.name=digits distlenet.train wrong=1 data/FashionMNIST --seed=3 checkpoint=RUN optim.lr"
    assert unknown_settings(code) == {"optim.rate", "wrong"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_each_command_exists(page):
    missing = []
    for module in re.findall(r"-m (distlenet[\w.]*)", page.read_text()):
        path = REPO / module.rstrip(".").replace(".", "/")
        if not (path.with_suffix(".py").exists() or (path / "__main__.py").exists()):
            missing.append(module)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_each_name_of_the_package_exists(page):
    missing = []
    for name in set(re.findall(r"(?<![\w./-])distlenet(?:\.\w+)+", page.read_text())):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_each_make_target_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z][\w-]*)", code_of(page), re.MULTILINE)) <= targets


def test_every_page_is_reachable_from_the_readme():
    readme = {(REPO / link.partition("#")[0]).resolve() for link in links(REPO / "README.md")}
    assert set(REPO.glob("docs/*.md")) <= readme


def texts_of_programs() -> str:
    """Return all string literals of the package, with a gap for each replacement field, and the batch scripts."""
    texts = [path.read_text() for path in (REPO / "slurm").iterdir()]
    for path in (REPO / "distlenet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("\0".join(part.value for part in node.values if isinstance(part, ast.Constant)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_the_messages_in_the_readme_are_those_of_the_programs():
    """Each message of the table of failures, split at what differs from run to run."""
    table = (REPO / "README.md").read_text().partition("## When things go wrong")[2].partition("\n## ")[0]
    seen = [row.split("|")[2] for row in table.splitlines() if row.startswith("| ")][2:]
    messages = [span for cell in seen for span in re.findall(r"`([^`]+ [^`]+)`", cell)]
    variable = r"ranks? \d[\d, ]*(?:of \d+ )?(?:on n\d)?|step-\S+|\bn\d|\d+|\b[NM]\b|SIG\w+|No space .*|[.:;,()]"
    fragments = {part.strip() for message in messages for part in re.split(variable, message)} - {""}
    assert len(messages) > 10
    texts = texts_of_programs()
    assert {fragment for fragment in fragments if fragment not in texts} == set()


def test_the_messages_of_the_troubleshooting_page_are_those_of_the_programs():
    """A message is a paragraph of bold code; … stands for what differs from run to run."""
    page = (REPO / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^\*\*`(.+)`\*\*$", page, re.MULTILINE)
    assert len(messages) == page.count("\n**") > 30
    texts = texts_of_programs()
    unknown = []
    for message in messages:
        parts = [re.escape(part) for part in message.split("…") if part.strip()]
        if not re.search("[^\n]*?".join(parts), texts):
            unknown.append(message)
    assert unknown == []


def language_files() -> list[Path]:
    files = [
        path for place in ("distlenet", "docs", "examples", "slurm", "launch") for path in (REPO / place).rglob("*")
    ]
    files += [REPO / "README.md", REPO / "CONTRIBUTING.md", REPO / "Makefile"]
    return sorted(path for path in files if path.is_file() and (path.suffix in TEXT_SUFFIXES or not path.suffix))


def private_words(text: str) -> set[str]:
    """Return each expression of ``PLAIN_WORDS`` in a text, also one that is broken over two lines."""
    patterns = (r"\b" + word.replace(" ", r"[\s#]+") + r"\b" for word in PLAIN_WORDS)
    hits = re.findall("|".join(patterns), text, re.IGNORECASE)
    return {" ".join(re.sub("#", " ", hit).lower().split()) for hit in hits}


def test_the_language_is_plain():
    hits = {
        relative(path): private_words(path.read_text()) - EXCEPTIONS.get(relative(path), set())
        for path in language_files()
    }
    assert {name: {word: PLAIN_WORDS[word] for word in words} for name, words in hits.items() if words} == {}


def test_a_private_word_is_found():
    assert private_words("It is Told.\n    # a process of its\n    # own") == {"told", "of its own"}

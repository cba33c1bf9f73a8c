"""Hooks of MkDocs: the pages and files outside docs/ that the pages link to, and Markdown as GitHub reads it.

The pages are written for the repository: their links are relative to their place in it. A file of the repository that
a page links to becomes a part of the site: a page as such, an image as such, and a source file as a page that shows it.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from diagram import draw
from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

REPO = Path(__file__).resolve().parents[2]
CODE_OR_LINK = re.compile(r"^ *```.*?^ *```|`[^`\n]+`|\]\((?P<link>[^)\s]+)\)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".sh": "sh", ".sbatch": "sh", ".yaml": "yaml", ".toml": "toml"}


class TwoSpaces(Extension):
    """Read two spaces as the indentation of a nested block, as GitHub does; Python-Markdown needs four."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Set the indentation."""
        md.tab_length = 2


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the options that are Python objects."""
    config.markdown_extensions.append(TwoSpaces())  # type: ignore[arg-type]
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")  # the anchors of GitHub
    fence = {"name": "mermaid", "class": "diagram", "format": draw}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def site_path(path: str) -> str:
    """Return the place in the site of a file of the repository: README.md is the home page, docs/ the root."""
    if path == "README.md":
        return "index.md"
    path = path.removeprefix("docs/").removeprefix(".github/")
    return f"{path}.md" if PurePosixPath(path).suffix in LANGUAGES else path


def repository_path(link: str, page: str) -> str:
    """Return the path in the repository that a link of a page leads to."""
    return os.path.normpath(PurePosixPath(page).parent / link)


def is_local(link: str) -> bool:
    """Check that a link leads to a file of the repository."""
    return not re.match(r"[a-z]+:|#", link)


def linked_files(page: str) -> list[str]:
    """Return the files that a page of the repository links to."""
    links = [match["link"] for match in CODE_OR_LINK.finditer((REPO / page).read_text())]
    return [repository_path(link.partition("#")[0], page) for link in links if link and is_local(link)]


def shown(path: str) -> str:
    """Return the Markdown of a file: its own, or a source file as a block of code."""
    text = (REPO / path).read_text()
    language = LANGUAGES.get(PurePosixPath(path).suffix)
    return f"# {path}\n\n````{language}\n{text}````\n" if language else text


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the top, and all files outside docs/ that pages link to, and so on."""
    sources = {f"docs/{file.src_uri}" for file in files.documentation_pages()}
    to_read = [*sources, "README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
    while to_read:
        path = to_read.pop()
        if path not in sources:
            sources.add(path)
            source = REPO / path
            content: dict[str, Any] = {"content": source.read_bytes()}
            if site_path(path).endswith(".md"):
                content = {"content": shown(path)}
            files.append(File.generated(config, site_path(path), **content))
        if path.endswith(".md"):
            to_read += [linked for linked in linked_files(path) if linked not in sources and (REPO / linked).is_file()]
    config.extra["sources"] = {site_path(path): path for path in sources}
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Rewrite the links of a page from the layout of the repository to that of the site."""
    source = config.extra["sources"][page.file.src_uri]
    if not source.endswith(".md"):
        return markdown
    here = PurePosixPath(page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        link = match["link"]
        if not link or not is_local(link):
            return match[0]
        name, mark, anchor = link.partition("#")
        target = site_path(repository_path(name, source))
        return f"]({os.path.relpath(target, here)}{mark}{anchor})"

    return CODE_OR_LINK.sub(rewrite, markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Mark the tables of the settings, which the style sheet stacks on a phone."""
    return f'<div class="settings">{html}</div>' if page.file.src_uri == "settings.md" else html


def on_post_page(output: str, **_: object) -> str:
    """Name the theme's search for screen readers."""
    return output.replace('role="dialog"', 'role="dialog" aria-label="Search"')

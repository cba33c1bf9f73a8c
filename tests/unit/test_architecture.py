"""The import edges between the packages of distlenet, as docs/architecture.md draws them."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import REPO, run_command

pytestmark = pytest.mark.unit

ROOT = REPO / "distlenet"
FILES = sorted(ROOT.rglob("*.py"))

ALLOWED = {
    "utils": set(),
    "models": {"config", "utils"},
    "task": {"config", "utils"},
    "tracking": {"utils"},
    "config": {"utils"},
    "distributed": {"config", "utils"},
    "data": {"config", "distributed", "images", "task", "utils"},
    "reduction": {"config", "distributed", "task", "utils"},
    "checkpoint": {"config", "distributed", "storage", "utils"},
    "storage": {"utils"},
    "images": set(),
    "tasks": {"config", "data", "distributed", "images", "models", "task", "utils"},
    "training": {"checkpoint", "config", "data", "distributed", "reduction", "task", "tasks", "tracking", "utils"},
    "preflight": {"checkpoint", "config", "data", "distributed", "storage", "tasks", "tracking", "training", "utils"},
    "prove": {"commands", "config", "data", "distributed", "reduction", "task", "tasks", "training", "utils"},
    "report": {"config", "distributed", "storage", "tracking", "utils"},
    "launch": {"utils"},
    "export": {"checkpoint", "config", "data", "distributed", "inference", "task", "tasks", "utils"},
    "inference": {"checkpoint", "config", "distributed", "task", "tasks", "utils"},
    "serve": {"images", "utils"},
    "commands": {
        "checkpoint",
        "config",
        "data",
        "distributed",
        "images",
        "inference",
        "reduction",
        "report",
        "storage",
        "task",
        "tasks",
        "tracking",
        "training",
        "utils",
    },
}
"""The packages that each package imports. ``commands`` are the entry points at the root, ``task`` is task.py."""


def node_of(parts: tuple[str, ...]) -> str | None:
    """Return the package of a module path below ``distlenet``; None for ``distlenet/__init__.py`` itself."""
    if len(parts) > 1 or (ROOT / parts[0]).is_dir():
        return parts[0]
    if parts[0] == "task":
        return "task"
    return "commands" if (ROOT / f"{parts[0]}.py").exists() and parts[0] != "__init__" else None


def imported_modules(path: Path) -> list[str]:
    """Return the dotted names of all modules of distlenet that a file imports, at any depth."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "distlenet":
            names += [f"distlenet.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    return [name for name in names if name.startswith("distlenet.")]


def find_edges() -> dict[str, set[str]]:
    """Return {package: packages it imports}, of every package, also of those that import nothing."""
    edges: dict[str, set[str]] = {}
    for path in FILES:
        source = node_of(path.relative_to(ROOT).with_suffix("").parts)
        if source is None:
            continue
        targets = {node_of(tuple(name.split(".")[1:])) for name in imported_modules(path)}
        edges.setdefault(source, set()).update(target for target in targets if target not in (None, source))
    return edges


def reachable(edges: dict[str, set[str]], start: str) -> set[str]:
    """Return every package that ``start`` imports, directly or through others."""
    seen: set[str] = set()
    pending = list(edges[start])
    while pending:
        package = pending.pop()
        if package not in seen:
            seen.add(package)
            pending += edges[package]
    return seen


def mermaid(edges: dict[str, set[str]]) -> str:
    """Draw an acyclic graph without the edges that a longer path implies (its transitive reduction)."""
    lines = ["flowchart TD"]
    for source in sorted(edges):
        implied = set().union(*(reachable(edges, target) for target in edges[source]))
        lines += [f"    {source} --> {target}" for target in sorted(edges[source] - implied)]
    return "\n".join(lines)


def test_each_import_edge_is_allowed():
    unexpected = {f"{a} -> {b}" for a, targets in find_edges().items() for b in targets - ALLOWED.get(a, set())}
    assert unexpected == set()


def test_each_allowed_edge_exists():
    edges = find_edges()
    assert edges.keys() == ALLOWED.keys()
    assert {f"{a} -> {b}" for a, targets in ALLOWED.items() for b in targets - edges[a]} == set()


def test_no_package_imports_itself_through_others():
    edges = find_edges()
    assert [package for package in edges if package in reachable(edges, package)] == []


def test_no_import_is_relative():
    relative = [
        f"{path.relative_to(REPO)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level > 0
    ]
    assert relative == []


def test_the_documentation_shows_the_import_edges():
    text = (REPO / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"```mermaid\n(.*?)\n```", text, re.DOTALL)
    expected = mermaid(find_edges())
    assert block == expected, f"the mermaid block of docs/architecture.md should be:\n{expected}"


def test_each_module_name_has_one_meaning():
    packages = [path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()]
    names = Counter([path.stem for path in FILES if not path.stem.startswith("__")] + packages)
    assert [name for name, count in names.items() if count > 1] == []


def test_the_export_and_the_server_share_the_names_of_a_model():
    place = "distlenet/utils/exported_model.py"
    for pattern in (r"model\.int8\.onnx", r"^\w*FORMAT = \d"):
        files = [str(path.relative_to(REPO)) for path in FILES if re.search(pattern, path.read_text(), re.M)]
        assert files == [place], pattern


def test_the_root_holds_only_the_interface_and_the_commands():
    assert len(list(ROOT.glob("*.py"))) <= 8


IMPORT_EACH_FIRST = """
import gc, os, sys, traceback
import filelock, matplotlib.figure, numpy, omegaconf, onnxruntime, PIL.Image, rich.console, tensorboard
import torch._dynamo, torch.distributed, torchvision, uvicorn
assert "distlenet" not in sys.modules
gc.disable()  # a collection would copy most pages of a process
for name in sys.argv[1:]:
    if not (child := os.fork()):
        try:
            __import__(name)
        except BaseException:
            traceback.print_exc(limit=-1)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name, flush=True)
"""


@pytest.mark.slow  # 10 s
def test_each_module_can_be_imported_first():
    parts = [path.relative_to(REPO).with_suffix("").parts for path in FILES]
    names = [".".join(part for part in each if part != "__init__") for each in parts]
    result = run_command(sys.executable, "-c", IMPORT_EACH_FIRST, *names).succeeded()
    assert result.stdout == "", result

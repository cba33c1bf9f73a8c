"""The house: imports go down a floor or stay beside, never up."""

import ast
from pathlib import Path

import pytest

import distlenet

pytestmark = pytest.mark.unit

ROOT = Path(distlenet.__file__).parent
FLOORS = [
    {
        *("errors", "schema", "net", "world", "rendezvous", "distributed", "exact", "files", "shared", "orphan"),
        "allocator",
        "background",
        "address",
    },
    {
        *(
            "config",
            "settings",
            "data",
            "optim",
            "precision",
            "metrics",
            "checkpoint",
            "tracking",
            "reduction",
            "replicas",
        ),
        *("preemption", "progress", "speed", "details", "images", "reporting", "watchdog", "graph", "guard"),
        *("ranklog", "failures", "checks"),
    },
    {"session", "checkpointer", "step", "diagnosis", "feed", "trainer", "plan", "rehearsal"},
    {"entry", "mirror", "predict", "preflight", "report", "train", "evaluate", "ledger", "data.__main__"},
]


def floor(module: str) -> int:
    """Return a module's floor; a package's modules share its floor unless they are named."""
    for name in (module, module.partition(".")[0]):
        for number, names in enumerate(FLOORS):
            if name in names:
                return number
    raise AssertionError(f"distlenet.{module} has no floor: give it one in this test")


def modules() -> dict[str, Path]:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ROOT.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in names.items() if name != "__init__"}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("distlenet."):
            found.add(node.module.removeprefix("distlenet."))
        elif isinstance(node, ast.ImportFrom) and node.module == "distlenet.data":
            found |= {f"data.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_go_down(module):
    for other in imported(modules()[module]):
        assert floor(other) <= floor(module), f"{module} imports {other}, which is above it"
        if floor(module) == 0:
            # Ranks meet by their places in the DistributedEnvironment, and a group is joined where they have met.
            assert other in {"errors", "world", "address", "rendezvous"}, (
                f"{module} is on the ground floor: it imports no sibling but the error"
            )

"""Check the tests themselves: each asserts something."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))
ASSERTING_CALLS = {"raises", "succeeded", "assert_close"}
"""Functions that fail a test by themselves, besides the asserting helpers of a file."""


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Return whether something below ``node`` can fail a test."""
    for part in ast.walk(node):
        if isinstance(part, ast.Assert):
            return True
        if isinstance(part, ast.Call):
            name = part.func.attr if isinstance(part.func, ast.Attribute) else getattr(part.func, "id", "")
            if name in ASSERTING_CALLS | helpers:
                return True
    return False


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_every_test_asserts_something(path):
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    helpers = {node.name for node in functions if not node.name.startswith("test_") and asserts(node, set())}
    tests = [node for node in functions if node.name.startswith("test_")]
    assert tests
    assert [node.name for node in tests if not asserts(node, helpers)] == []

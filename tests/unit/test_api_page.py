"""The examples of docs/api.md run, in their order, as one program."""

import re

import pytest
from conftest import REPO
from forked import run_python

pytestmark = [pytest.mark.unit, pytest.mark.slow]


def test_the_examples_of_the_api_page_run(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", (REPO / "docs/api.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 10
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(blocks))
    run_python(script, cwd=tmp_path).succeeded()

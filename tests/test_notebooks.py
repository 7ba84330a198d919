"""The notebooks are committed small and without outputs that nobody can review.

.ci/run runs them.
"""
import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_fit_to_be_committed(path):
    cells = json.loads(path.read_text())["cells"]
    assert path.stat().st_size < 200_000
    assert cells[0]["cell_type"] == "markdown"
    assert "At the end you can" in "".join(cells[0]["source"])
    code = [ast.parse("".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    assert any(isinstance(node, ast.Assert) for tree in code for node in ast.walk(tree))  # checks


def test_there_are_notebooks():
    assert NOTEBOOKS

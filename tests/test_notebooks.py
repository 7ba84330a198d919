"""Notebooks can be read without being run: their outputs are there, and are those of their code.

`python notebooks/execute.py` makes them; .ci/run runs them all.
"""
import ast
import json
import re
from pathlib import Path

import pytest

from execute import digest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("[0-9]*.ipynb"))
DRAWS = re.compile(r"plt\.show\(|\bdisplay\(|Markdown\(|\bShow\(")
PICTURES = "image/png", "image/jpeg", "image/gif", "text/html", "text/markdown"


def outputs_of(cell):
    return cell.get("outputs", [])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_is_fit_to_be_committed(path):
    notebook = json.loads(path.read_text())
    cells = notebook["cells"]
    assert path.stat().st_size < 400_000
    assert cells[0]["cell_type"] == "markdown"
    assert "At the end you can" in "".join(cells[0]["source"])
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    trees = [ast.parse("".join(cell["source"])) for cell in code]
    assert any(isinstance(node, ast.Assert) for tree in trees for node in ast.walk(tree))  # checks
    assert notebook["metadata"].get("executed") == digest(notebook), (
        f"its outputs are of other code: python notebooks/execute.py notebooks/{path.name}")
    for cell in code:
        source = "".join(cell["source"])
        kinds = {kind for each in outputs_of(cell) for kind in each.get("data", {})}
        if any(not line.startswith((" ", "def ")) and DRAWS.search(line)
               for line in source.splitlines()):
            assert kinds.intersection(PICTURES), f"no picture:\n{source}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_say_nothing_of_trouble_or_of_a_machine(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert "execution" not in cell["metadata"]
        for each in outputs_of(cell):
            assert each["output_type"] != "error" and each.get("name") != "stderr"
            words = {kind: data for kind, data in each.get("data", {}).items()
                     if not kind.startswith("image")}
            text = json.dumps([each.get("text"), words])
            assert not re.search(r"/(home|root|tmp|work|var)/|it/s|step/s|Warning", text), text


def test_all_together_are_no_burden():
    assert NOTEBOOKS
    assert sum(path.stat().st_size for path in NOTEBOOKS) < 2_500_000

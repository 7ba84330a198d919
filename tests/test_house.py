"""Rules of the house: what is to be read fits the eye and the screen."""
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [ROOT / f"{name}.py"
           for name in ("sparsestmax", "search_space", "supernet", "search", "evaluate")]
NEIGHBOURS = sorted(ROOT.glob("notebooks/neighbours/*.py"))
FILES = [*MODULES, *sorted(ROOT.glob("notebooks/*.py")), *NEIGHBOURS,
         *sorted(ROOT.glob("tests/*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_longer_than_100_columns(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    long = [f"{path.name}:{number} has {len(line)}" for number, line in lines if len(line) > 100]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_no_module_is_larger_than_48_kB(path):
    assert path.stat().st_size <= 48_000


@pytest.mark.parametrize("path", NEIGHBOURS, ids=lambda path: path.name)
def test_a_neighbour_is_read_in_a_quarter_of_an_hour(path):
    assert len(path.read_text().splitlines()) <= 300


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 9_000

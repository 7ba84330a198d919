"""Run notebooks from top to bottom, and keep what they draw and print in them.

    python notebooks/execute.py                               # all of them, a quarter of an hour
    python notebooks/execute.py notebooks/4_search.ipynb

That is how their pictures came in. Left out is what says nothing to a reader: progress bars and
warnings (stderr), widgets, which need a running kernel, and the clock. `executed` in a notebook's
metadata is a digest of the code that made the outputs: tests/test_notebooks.py compares it with the
code that is there.
"""
import base64
import hashlib
import io
import json
import sys
from pathlib import Path

import nbformat
import numpy as np
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # where the five modules are

from evaluate import CommandLine
from search_space import write_whole


def digest(notebook) -> str:
    """Of the sources of all code cells."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def smaller(data: dict):
    """Make the PNG among an output's data smaller.

    A drawing is kept in 256 colours, which it hardly has more of: a third of the bytes. A
    photograph becomes a JPEG: it is there to be looked at, figures are computed before.
    """
    png = base64.b64decode(data.pop("image/png"))
    image, buffer = Image.open(io.BytesIO(png)).convert("RGB"), io.BytesIO()
    few = image.quantize(256, dither=Image.Dither.NONE)
    if np.abs(np.int16(few.convert("RGB")) - np.int16(image)).mean() < 0.3:  # of 255: unseen
        few.save(buffer, "PNG", optimize=True)
        kind = "image/png"
    else:
        image.save(buffer, "JPEG", quality=80, subsampling=0)
        kind = "image/jpeg"
    data[kind] = base64.b64encode(buffer.getvalue()).decode()


def execute(path: Path):
    """Raises nbclient's CellExecutionError where a cell fails; the file stays as it was then."""
    path = path.resolve()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", coalesce_streams=True,
                   resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr" and
                            "application/vnd.jupyter.widget-view+json" not in each.get("data", {})]
            for data in (each.get("data", {}) for each in cell.outputs):
                if "image/png" in data:
                    smaller(data)
                if "text/plain" in data:  # a name of a file says where this machine keeps it
                    data["text/plain"] = data["text/plain"].replace(f"{path.parent}/", "")
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}  # without the version
    notebook.metadata.executed = digest(notebook)
    write_whole(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def main(argv=None):
    parser = CommandLine(prog="execute.py", description="Run notebooks, and keep their outputs.")
    parser.add_argument("notebooks", nargs="*", type=Path,
                        default=sorted(HERE.glob("[0-9]*.ipynb")))
    with parser.guard():
        for path in parser.parse_args(argv).notebooks:
            execute(path)
            print(f"{path}: {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()

"""Run the notebooks and keep what they show, without what differs from one execution to the next.

python -m notebooks.execute            # all of them, in place
python -m notebooks.execute 02 04      # those whose names begin so
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
KERNEL: dict[str, Any] = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""Metadata that any Python 3 kernel answers to."""
_KEPT = ("tags",)  # of a cell's metadata; times and editor state are volatile
_COLOURS = 64  # of a figure: lines on white need no more, and the file is a third of the size


def paths(names: list[str] | None = None) -> list[Path]:
    """Return the notebooks whose file names begin with one of the names, all of them for none, in reading order.

    Raises:
        SystemExit: A name fits no notebook.
    """
    known = sorted(FOLDER.glob("[0-9]*.ipynb"))
    if not names:
        return known
    for name in names:
        if not any(path.name.startswith(name) for path in known):
            raise SystemExit(f"no notebook begins with {name!r}: there is {', '.join(path.stem for path in known)}")
    return [path for path in known if path.name.startswith(tuple(names))]


def read(path: Path) -> NotebookNode:
    """Read a notebook file as version 4."""
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def execute(notebook: NotebookNode, folder: Path, timeout: int = 300) -> NotebookNode:
    """Run every cell in a fresh kernel, which imports this checkout whatever else is installed.

    Args:
        notebook: Its outputs are replaced.
        folder: Working directory of the kernel.
        timeout: Seconds that one cell may take.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources=resources)
    return client.execute(env=environment(os.environ))


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the kernel's environment: this checkout before anything installed, and one thread for steady numbers."""
    search = [str(FOLDER.parent), *filter(None, [inherited.get("PYTHONPATH")])]
    # tqdm asks for the widgets of a notebook that nobody is looking at.
    quiet = {"PYTHONWARNINGS": "ignore:IProgress not found"}
    return {**inherited, **quiet, "PYTHONPATH": os.pathsep.join(search), "OMP_NUM_THREADS": "1"}


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Drop what an execution leaves besides the outputs: times, kernel and editor state; pictures become small ones."""
    notebook.metadata = NotebookNode(KERNEL)
    for cell in notebook.cells:
        cell.metadata = NotebookNode({key: value for key, value in cell.metadata.items() if key in _KEPT})
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output.metadata = NotebookNode()
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    return notebook


def _smaller(encoded: str) -> str:
    """Redraw a base64 PNG with a palette."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(_COLOURS, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Execute notebooks in place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="how the notebooks' names begin; all for none")
    for path in paths(parser.parse_args().names):
        # A folder that is neither the repository nor the notebooks': whatever a cell writes there by mistake goes away.
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = tidy(execute(read(path), Path(folder)))
            except CellExecutionError as error:
                print(f"{path.name}: {error}", file=sys.stderr)
                raise SystemExit(1) from None
        nbformat.write(done, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
